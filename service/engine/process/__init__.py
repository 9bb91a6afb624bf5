"""The engine process: its thread, its side of the socket, and what it reads from the store."""
