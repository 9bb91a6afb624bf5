"""Generation of text: the model that a request names, tokens in, text out, and scoring."""
