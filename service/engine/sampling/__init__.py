"""From logits to the next token, and the log-probabilities to report."""
