"""Training files: JSON lines, the examples in them, and the messages in an example."""
