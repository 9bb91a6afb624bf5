"""What travels between API processes and the engine, and how it is framed."""
