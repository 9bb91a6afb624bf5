"""The tensors of the KV cache on a CPU: zeros that take memory only where they are written."""

from __future__ import annotations

import psutil
import torch

from service.engine.kv.cache import KVShape, PagedKV

MIB = 1024**2


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def test_blocks_take_no_memory_before_they_are_written() -> None:
    before = resident_bytes()
    kv = PagedKV(
        [KVShape(2, 64, 64)] * 2, num_blocks=32_768, block_size=16, device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert kv.nbytes > 500 * MIB
    assert resident_bytes() - before < 50 * MIB

    K, V = kv.pages_of(1)
    assert not K[1000:1010].any()
    assert not V[-1].any()

    blocks = torch.tensor([3, 4])
    rows = kv.rows(2, blocks, torch.tensor([0, 15]))
    kv.write(1, torch.ones(2, 2, 64, dtype=torch.bfloat16), torch.ones(2, 2, 64, dtype=torch.bfloat16), rows)
    assert float(K[3:5].sum()) == 2 * 2 * 64
    kv.clear(blocks)
    assert not K[3:5].any()
