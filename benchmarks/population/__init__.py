"""How close does a new user who trains R alone come to LoRA? `python -m benchmarks.population`."""
