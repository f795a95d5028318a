"""The embedded language model `nano`: the synthetic text it learns from, and its training."""
