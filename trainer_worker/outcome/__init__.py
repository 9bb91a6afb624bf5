"""What becomes of a run: the adapter that is published, and what is reported of it."""
