"""Sampling: the next token from logits, and the log-probabilities to report."""
