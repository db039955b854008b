"""Cross-entropy of a row against a bag of targets: one logsumexp, whatever the bag size.

``logits`` for callers who hold logits, ``linear`` for hidden states and an output head (the logits never exist whole).
"""

from token_superposition.loss.linear import IMPLEMENTATIONS, linear_multi_hot_cross_entropy
from token_superposition.loss.logits import multi_hot_cross_entropy

__all__ = ["IMPLEMENTATIONS", "linear_multi_hot_cross_entropy", "multi_hot_cross_entropy"]
