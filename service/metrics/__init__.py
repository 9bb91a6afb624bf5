"""Prometheus metrics: those that the service counts itself, and figures of the engine, queue and store."""
