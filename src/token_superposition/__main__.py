"""``python -m token_superposition`` is ``tst``."""

from token_superposition.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
