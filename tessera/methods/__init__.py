"""How A, B and the first R are made: the published methods, what they share, and the initializations."""
