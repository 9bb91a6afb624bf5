"""What the service and the trainer worker must agree on: maths, formats, keys, the Redis protocol.

Knows no HTTP, no scheduler and no training loop. Dimension letters used in every docstring:

    T tokens in the flattened batch    N sequences        S slots (adapters resident on the device)
    M target modules                   L decoder layers   r rank        V vocabulary
    d_in, d_out width of a linear layer's input and output
"""
