"""What the worker, its sessions and its training thread share, so that they need not import one another.

Commands to a session, the duties of every worker, calls that are repeated while the store is away, the lock
on the base model, metrics and health.
"""
