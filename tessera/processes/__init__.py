"""Child processes, restarts and event loops, for every program that starts another."""
