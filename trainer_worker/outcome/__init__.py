"""The outcome of a run: the published adapter, and what is reported about it."""
