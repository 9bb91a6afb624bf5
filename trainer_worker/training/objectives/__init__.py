"""What a run minimises: from the log-probabilities of its rows to losses, gradients and metrics."""
