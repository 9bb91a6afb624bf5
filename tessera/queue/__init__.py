"""The training queue in Redis: what a job is, the client's side, and the worker's leases."""
