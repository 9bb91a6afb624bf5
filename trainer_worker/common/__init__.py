"""Shared by all parts of the worker: commands, store retries, the model lock, metrics and health."""
