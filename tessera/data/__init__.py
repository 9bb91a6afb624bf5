"""Training files: JSON lines, examples, and the messages in them."""
