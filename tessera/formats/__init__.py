"""The objects that are stored and exchanged: a basis, an adapter, and a plain LoRA in the form of both."""
