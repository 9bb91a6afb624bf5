"""The decode benchmark times what it says: whole batches, contexts as long as asked for, the right bytes."""

from __future__ import annotations

import argparse

import torch

from benchmarks.decode.__main__ import add_ratios, engine_rows, step_bytes
from benchmarks.decode.random_models import random_adapter, random_basis, random_model
from benchmarks.decode.steps import start_batch
from service.engine.engine import Engine
from service.engine.settings import EngineConfig

CPU = torch.device("cpu")


def test_a_row_for_every_case() -> None:
    base = random_model("small", device=CPU, dtype=torch.float32, max_position=256)
    arguments = argparse.Namespace(
        batch=[1, 3], context=[20], distinct=[1, 8], rank=[4], steps=2, decode_graphs="static",
        lookahead="auto", continuous_batching=False, mixed=[5], kernels=False,
    )  # fmt: skip
    rows = list(engine_rows(base, arguments, bandwidth=1e9))
    add_ratios(rows)

    mixed = [row for row in rows if row["what"] == "engine, mixed"]
    rows = [row for row in rows if row not in mixed]
    assert [row["prompt"] for row in mixed] == [5] * len(rows)
    assert all(row["tokens_per_s"] > 0 and row["host_ms"] > 0 for row in mixed)
    cases = [(row["batch"], row["rank"], row["adapters"]) for row in rows]
    assert cases == [(1, 0, 0), (3, 0, 0), (1, 4, 1), (3, 4, 1), (3, 4, 3)]
    assert all(row["tokens_per_s"] > 0 and row["device_ms"] > 0 for row in rows)
    assert rows[0]["ratio_to_bare"] == 1.0


def test_contexts_are_as_long_as_asked_for() -> None:
    base = random_model("small", device=CPU, dtype=torch.float32, max_position=256)
    engine = Engine(base, EngineConfig(num_blocks=64, block_size=8, enable_prefix_cache=False))
    start_batch(engine, [None, None], context=33, num_steps=4)
    engine.step()
    running = engine.scheduler.running
    engine.close()

    assert [(sequence.num_tokens, sequence.num_computed) for sequence in running] == [(34, 33)] * 2


def test_bytes_of_a_step() -> None:
    base = random_model("small", device=CPU, dtype=torch.float32, max_position=256)
    layer = 256 * (256 + 2 * 64 + 256) + 3 * 256 * 688 + 2 * 256
    weights = 4 * layer + 256 + 256 * 2048
    assert step_bytes(base, 3, 10) == 4 * (weights + 3 * 10 * 4 * 2 * 64)


def test_random_adapters_differ_and_fit() -> None:
    base = random_model("small", device=CPU, dtype=torch.float32, max_position=64)
    basis = random_basis(base, 4)
    first, second = random_adapter(basis, 0), random_adapter(basis, 1)
    assert first.R.shape == (28, 4, 4)
    assert not torch.equal(first.R, second.R)
