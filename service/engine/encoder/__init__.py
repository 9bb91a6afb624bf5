"""Base models that are encoders: whole texts through the model, and one pooled state of each."""
