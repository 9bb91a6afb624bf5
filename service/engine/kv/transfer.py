"""Small numbers on their way to the device, without waiting for it: from pinned memory, behind what runs
there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]


def upload(arrays: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """The arrays on the device, as int64 views of one tensor that was copied at once."""
    flat = _to_device(torch.from_numpy(np.concatenate([array.ravel() for array in arrays])), device)
    pieces = torch.split(flat, [array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


def to_device(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values as a tensor [n] on the device."""
    return _to_device(torch.tensor(values, dtype=dtype), device)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
