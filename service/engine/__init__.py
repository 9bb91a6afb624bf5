"""The engine: serves one base model with many adapters in one batch, in a process of its own."""
