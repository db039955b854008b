"""Adapters to training engines, one folder each. The core imports none of them."""
