"""Training scripts as people have them (``plain/``), and the same with token superposition. docs/examples.md has the
differences."""
