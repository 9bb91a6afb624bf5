"""The public ops of the adapter path, one line of semantics each.

The rest of the tree imports ops only from here. The slow truth of every op is in `reference.py`.
"""

from adapter_core.kernels.reference import adapter_delta, rank_delta

__all__ = ["adapter_delta", "rank_delta"]
