"""The device's memory: how many KV blocks fit, what uses it, and how a step's small numbers get there."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from service.engine.kv.cache import KVShape
from service.engine.settings import EngineConfig
from tessera.errors import InvalidInput

Ints = npt.NDArray[np.int64]

#: The default on a CPU: enough for 16 sequences of 2,000 tokens of a 1B model. Unused pages are not touched.
CPU_KV_BYTES = 256 * 1024**2
#: The default share of what is free on a GPU once the weights are loaded. The rest is for the slots of
#: several bases (29 MB each at 8B, rank 16, 256 slots), their factors (84 MB), the activations and logits of
#: a step, and CUDA graphs.
GPU_KV_SHARE = 0.8


def num_kv_blocks(
    shapes: Sequence[KVShape],
    config: EngineConfig,
    *,
    max_position: int,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Return the number of KV blocks: as many as are configured or fit, but no more than can be used. Raises
    `InvalidInput` if not one fits."""
    if config.num_blocks is not None:
        return config.num_blocks
    block_bytes = config.block_size * sum(shape.bytes_per_token(dtype) for shape in shapes)
    num_blocks = (config.kv_cache_bytes or _default_kv_bytes(device)) // block_bytes
    if num_blocks < 1:
        raise InvalidInput(f"no room for a KV block of {block_bytes} bytes", param="kv_cache_bytes")
    return min(num_blocks, config.max_running * -(-max_position // config.block_size))


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers. A tensor with several names (tied weights) counts once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers()) if t.nbytes}
    return sum(tensors.values())


def add_remainder(used: dict[str, int], device: torch.device) -> dict[str, int]:
    """Complete `used`, bytes by kind: on CUDA with `free` and `workspace` (activations, the allocator's
    reserve, CUDA's own), so that the sum is the device's memory; on a CPU with `process_rss`, which includes
    them."""
    if device.type != "cuda":
        import psutil  # imported here because a GPU machine can serve without it

        return {**used, "workspace": 0, "process_rss": int(psutil.Process(os.getpid()).memory_info().rss)}
    free, total = torch.cuda.mem_get_info(device)
    return {**used, "workspace": max(0, total - free - sum(used.values())), "free": free}


def _default_kv_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_KV_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(GPU_KV_SHARE * free)


def upload(arrays: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """Copy the arrays to the device at once, and return them as int64 views of one tensor.

    Here and in `to_device` nothing waits for the device: the copy starts from pinned memory, behind what runs
    there.
    """
    flat = _to_device(torch.from_numpy(np.concatenate([array.ravel() for array in arrays])), device)
    pieces = torch.split(flat, [array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


def to_device(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the values as a tensor [n] on the device."""
    return _to_device(torch.tensor(values, dtype=dtype), device)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
