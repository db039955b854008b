"""Text to tokens on disk (``sources``, ``tokenizer``, ``prepare``), tokens to samples (``store``, ``plan``)."""
