"""The processes of the service: the HTTP server, API workers, the twin that forks for large inputs, and what
these share (a gate that is fair to tenants, and memory settings)."""
