"""From a prompt to text: which model is meant, tokens in, text out, and scoring."""
