"""How fast, and against what: each module answers one question and prints ratios measured in one run."""
