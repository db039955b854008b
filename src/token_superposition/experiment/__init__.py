"""Runs on the default engine: ``config``, one ``run``, and ``compare``: several runs at equal compute."""
