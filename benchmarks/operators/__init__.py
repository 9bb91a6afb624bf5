"""What do adapters cost at the level of operators? Decoder layers without attention, in one run, as ratios.

| module | what it does |
|---|---|
| `stack` | the layers: weights, the bare forms and the forms with adapters |
| `peers` | the same deltas by plain torch ops, and LoRA of the same rank gathered per token |
| `single` | each fused op alone, bare and with a delta |
| `tune` | the fastest tile per op, rank and number of tokens, as the table of `gpu/tiling.py` wants it |
"""
