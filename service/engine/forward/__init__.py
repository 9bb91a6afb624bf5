"""Decoder layers of the Llama family run by our own fused ops, on the same weights as the model.

Agrees with the generic path (the unmodified model) and is checked against it when it is built; what is not
recognised is served by the generic path.
"""
