"""The operator benchmark compares like with like: all its ways give the same numbers, at any popularity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.operators.__main__ import main
from benchmarks.operators.peers import Loras, lora, torch_ops
from benchmarks.operators.stack import NUM_MODULES, Adapters, Geometry, Step, Weights
from benchmarks.operators.tune import CANDIDATES, candidates
from service.engine.kernels.tiling import tile_of
from tests.popularity import POPULARITIES

GEOMETRY = Geometry(hidden=24, ff=40, heads=2, kv_heads=1, head_dim=8, layers=2)
RANK, NUM_TOKENS = 4, 9


@pytest.fixture(scope="module")
def weights() -> Weights:
    torch.manual_seed(0)
    weights = Weights(GEOMETRY, torch.device("cpu"), torch.float64)
    for layer in weights.W:
        for W in layer.values():
            W.mul_(10)  # so that deltas and layers show
    return weights


@pytest.fixture(scope="module")
def adapters(weights: Weights) -> Adapters:
    adapters = Adapters(weights, RANK, NUM_TOKENS)
    adapters.R_slots *= 1e4
    return adapters


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # sums of squares are float32


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_peers_compute_the_same(weights: Weights, adapters: Adapters, popularity: str) -> None:
    step = Step(weights, NUM_TOKENS)
    slots = step.slots(popularity)
    expected = step.adapted(adapters, slots)
    same(step.adapted(adapters, slots, puts_off=False), expected)
    same(torch_ops(step, adapters, slots)(), expected)
    same(lora(step, as_loras(weights, adapters), slots)(), expected)
    bare = step.bare()
    same(step.appended(adapters), bare)
    same(step.bare(puts_off=False), bare)
    assert torch.allclose(expected, bare, rtol=1e-3) == (popularity == "none")


def test_small_run_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "operators.json"
    main(["--geometry", "small", "--tokens", "3", "--ranks", "16", "--repeats", "1", "--json", str(path)])
    whats = [row["what"] for row in json.loads(path.read_text())["rows"]]
    assert {"bare", *POPULARITIES, "torch ops", "LoRA, distinct"} <= set(whats)
    main(["--geometry", "small", "--tokens", "2", "--ranks", "4", "--repeats", "1", "--single"])
    assert "op add_residual" in capsys.readouterr().out


@pytest.mark.parametrize("table", CANDIDATES)
def test_tiles_to_try(table: str) -> None:
    few, many = (set(candidates(table, num_tokens, 16)) for num_tokens in (1, 256))
    assert {tile.tokens for tile in few} == {1}
    assert {tile.tokens for tile in many} == {16, 32, 64}
    assert tile_of(table, 1) in few
    assert tile_of(table, 256) in many, "what is in use is measured beside the others"


def as_loras(weights: Weights, adapters: Adapters) -> Loras:
    """Every adapter as an ordinary LoRA: the same A for all, B R for B."""
    loras = Loras(weights, RANK, NUM_TOKENS)
    for layer, groups in enumerate(loras.factors):
        for name, (A, B) in groups.items():
            _, widths, modules = GEOMETRY.groups[name]
            A[:] = adapters.WA[layer][name][sum(widths) :][: len(widths) * RANK].view(len(widths), RANK, -1)
            own = adapters.factors[layer][name].B.split(widths)
            parts = [
                part @ adapters.R_slots[:, layer * NUM_MODULES + module]
                for part, module in zip(own, modules, strict=True)
            ]
            B[:] = torch.cat(parts, dim=1)
    return loras
