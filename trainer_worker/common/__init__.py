"""The parts that the worker, its sessions and its training thread share without importing one another.

Commands and waits of a session, the duties of every worker, the lock on the base model, metrics and health.
"""
