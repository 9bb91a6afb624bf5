"""The forward pass of a model: the unmodified model, or fused ops on the same weights for known
architectures.

The fused path is checked against the unmodified model when it is built. A model that is not recognised runs
unmodified.
"""
