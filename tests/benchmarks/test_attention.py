"""The attention benchmark times what it says: the same attention, counted right."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention.__main__ import ours
from benchmarks.attention.peers import peers
from benchmarks.attention.workload import Heads, Layers, Workload
from benchmarks.device_time import time_on_device

CPU = torch.device("cpu")
HEADS = Heads(num_heads=4, num_kv_heads=2, dim=16)


def make_workload(queries: int) -> Workload:
    return Workload(HEADS, 3, 40, queries, torch.float32, CPU, block_size=8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted there")
@pytest.mark.parametrize("queries", [1, 7])
def test_ours_is_the_reference_implementation(queries: int) -> None:
    pytest.importorskip("triton")
    layers = Layers(make_workload(queries))
    rows = range(3)

    layers.check(layers.attend(layers.torch_step()), rows)
    layers.check(layers.attend(layers.triton_step(queries_per_tile=4)), rows)
    with pytest.raises(AssertionError, match="differs by"):
        layers.check(torch.zeros_like(layers.q), rows)


def test_what_is_counted() -> None:
    assert make_workload(1).kv_bytes == 3 * 40 * 2 * (16 + 16) * 4
    assert make_workload(1).flops == 3 * 4 * (40 * 2 * 16 + 40 * 2 * 16)
    assert make_workload(7).flops == 3 * 4 * sum(4 * 16 * (33 + i) for i in range(1, 8))
    assert make_workload(1).num_layers == 1


@pytest.mark.parametrize("queries", [1, 7, 40])
def test_every_implementation_runs(queries: int) -> None:
    workload = make_workload(queries)
    runs = dict([*ours(workload), *peers(workload)])

    assert len(runs) == (1 if queries == 7 else 2)
    for run in runs.values():
        assert len(time_on_device(run, device=CPU, repeats=2)) == 2
