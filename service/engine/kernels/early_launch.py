"""Programmatic dependent launch (from sm_90 on): a kernel begins while the one before it still runs.

A kernel launched like this reads what the step's kernels do not write (slots, factors, weights), waits, and
goes on. The wait is in the kernel (`gdc_wait`), and every program of it must come to it: a later kernel of
the ordinary kind waits for this one, and by that for all before.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def is_early(like: Tensor) -> bool:
    """Whether kernels on this tensor's device are launched before their inputs are there."""
    return like.is_cuda and _is_possible(like.device)


@functools.cache
def _is_possible(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
