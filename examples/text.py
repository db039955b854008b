"""Text files to train.bin and val.bin, one uint16 token for a byte: the data of the examples.

python -m examples.text README.md docs/*.md --out data
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data"))
    args = parser.parse_args(argv)
    text = b"\n".join(file.read_bytes() for file in args.files)
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    cut = int(0.9 * len(tokens))
    args.out.mkdir(parents=True, exist_ok=True)
    tokens[:cut].tofile(args.out / "train.bin")
    tokens[cut:].tofile(args.out / "val.bin")
    print(f"{cut:,} tokens to train on, {len(tokens) - cut:,} held out")


if __name__ == "__main__":
    main()
