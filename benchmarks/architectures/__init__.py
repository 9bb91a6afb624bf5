"""Which architectures of transformers the engine serves, and how: `python -m benchmarks.architectures`."""
