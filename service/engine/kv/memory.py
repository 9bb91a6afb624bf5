"""Bytes: how many KV blocks there is room for, and what the device's memory is used for."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from service.engine.kv.cache import KVShape
from service.engine.settings import EngineConfig
from tessera.errors import InvalidInput

#: On a CPU: enough for 16 sequences of 2,000 tokens of a 1B model; pages are only touched when used.
CPU_KV_BYTES = 256 * 1024**2
#: Of what is free on a GPU once the weights are loaded. The rest is for the slots of several bases (29 MB
#: each at 8B, rank 16, 256 slots), their factors (84 MB), a step's activations and logits, and CUDA graphs.
GPU_KV_SHARE = 0.8


def num_kv_blocks(
    shapes: Sequence[KVShape],
    config: EngineConfig,
    *,
    max_position: int,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """As many blocks as are configured or fit, but no more than can be used. Raises `InvalidInput` if
    none."""
    if config.num_blocks is not None:
        return config.num_blocks
    block_bytes = config.block_size * sum(shape.bytes_per_token(dtype) for shape in shapes)
    num_blocks = (config.kv_cache_bytes or _default_kv_bytes(device)) // block_bytes
    if num_blocks < 1:
        raise InvalidInput(f"no room for a KV block of {block_bytes} bytes", param="kv_cache_bytes")
    return min(num_blocks, config.max_running * -(-max_position // config.block_size))


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, each tensor once however many names it has (tied weights)."""
    tensors = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers()) if t.nbytes}
    return sum(tensors.values())


def add_remainder(used: dict[str, int], device: torch.device) -> dict[str, int]:
    """`used` bytes by kind, completed: on CUDA by `free` and `workspace` (activations, the allocator's
    reserve, CUDA's own), so that they add up to the device; on a CPU by `process_rss`, of which they are a
    part."""
    if device.type != "cuda":
        return {**used, "workspace": 0, "process_rss": _process_rss()}
    free, total = torch.cuda.mem_get_info(device)
    return {**used, "workspace": max(0, total - free - sum(used.values())), "free": free}


def _default_kv_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_KV_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(GPU_KV_SHARE * free)


def _process_rss() -> int:
    import psutil  # only here: a GPU machine without it can serve

    return int(psutil.Process(os.getpid()).memory_info().rss)
