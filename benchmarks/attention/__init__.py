"""How near to the memory's bandwidth is paged decode attention, and how many FLOP/s does prefill reach?

    python -m benchmarks.attention              decode and prefill, with peers, on the device at hand
    python -m benchmarks.attention --tune       the launch shapes that are fastest here, as rows of `CONFIGS`

Every implementation is checked against the reference implementation before it is timed.
"""
