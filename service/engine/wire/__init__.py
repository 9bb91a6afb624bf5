"""The messages between API processes and the engine, and their frames."""
