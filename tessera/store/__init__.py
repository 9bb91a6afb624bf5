"""Adapters, bases and files in Redis, who owns them, and how a new version is published."""
