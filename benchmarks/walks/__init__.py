"""How many files and functions of our own code one request and one training job cross."""
