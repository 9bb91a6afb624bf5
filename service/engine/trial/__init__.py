"""The trial of every model when it is loaded: whether the engine computes the same as the model."""
