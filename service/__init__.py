"""The HTTP service: the API, the engine process that it starts, and the submission of jobs."""
