"""The methods by which A, B and the first R are made, their shared parts, and the initializations."""
