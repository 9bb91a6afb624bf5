"""The processes of the service: the HTTP server, API workers, and the twin that forks for large inputs."""
