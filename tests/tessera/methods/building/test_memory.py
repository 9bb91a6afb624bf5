"""What building a basis needs in memory (methods catalogue SB6, issue 3's bound)."""

from __future__ import annotations

import peft
import pytest
import torch

from tessera.defaults import LLAMA_LINEARS as LINEARS
from tessera.methods.bases import build_basis
from tessera.methods.building.collected import Needs
from tessera.methods.building.gradients import collect
from tessera.methods.building.targets import find_targets
from tests.tessera.methods.matrices import chordal, small_calibration, small_model
from tests.tessera.methods.memory import peak_bytes


def test_sb6_peak_memory_does_not_grow_with_depth() -> None:
    """Four times the layers, one layer a pass: the statistics' part of the peak stays the same.

    What a frozen model keeps for its own backward pass (attention probabilities, the inputs of nonlinear
    functions) grows with depth for any method; it is measured by the same pass with nothing collected but
    one module, and left out.
    """
    calibration, needs = small_calibration(1), Needs(gradient=True)

    def statistics_peak(num_layers: int, per_pass: int) -> int:
        base = small_model(num_layers=num_layers, hidden=64)
        targets = find_targets(base.model, LINEARS, 1)

        def run() -> None:
            for first in range(0, len(targets), 7 * per_pass):
                collect(base, targets[first : first + 7 * per_pass], calibration, needs)

        backbone = peak_bytes(lambda: collect(base, targets[:1], calibration, needs))
        return peak_bytes(run) - backbone

    shallow, deep = statistics_peak(2, 1), statistics_peak(8, 1)
    assert deep < 1.05 * shallow
    assert statistics_peak(8, 8) > 5 * shallow, "without groups it does grow"


#: (width, tokens in one batch). LoRA-DA's n x n factors do not fit beside 64 tokens from 384 wide on.
GRID = [(64, 64), (96, 1024), (192, 64), (192, 128), (192, 256), (288, 64), (288, 128)]
TOO_WIDE = [(384, 64)]


def building_peak(method: str, width: int, num_tokens: int) -> int:
    base = small_model(num_layers=3, hidden=width)
    calibration = small_calibration(num_tokens // 64, lengths=(64,))
    return peak_bytes(lambda: build_basis(base, method=method, rank=8, calibration=calibration))


def training_peak(width: int, num_tokens: int) -> int:
    """Of LoRA by PEFT on the same batches: A, B, gradients, AdamW's moments and activations."""
    base = small_model(num_layers=3, hidden=width)
    calibration = small_calibration(num_tokens // 64, lengths=(64,))

    def train() -> None:
        model = peft.get_peft_model(base.model, peft.LoraConfig(r=8, target_modules=list(LINEARS)))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-4)
        for batch in [*calibration.batches()] * 2:  # the second step is the first with moments
            labels = torch.where(batch.labels, batch.token_ids, -100)
            model(input_ids=batch.token_ids, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    return peak_bytes(train)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(("width", "num_tokens"), GRID)
def test_sb6_building_needs_less_memory_than_training_lora(width: int, num_tokens: int) -> None:
    """Issue 3: LoRA-SB and LoRA-DA never exceed the peak of training LoRA on the same batch."""
    lora = training_peak(width, num_tokens)

    assert building_peak("lora_sb", width, num_tokens) < lora
    assert building_peak("lora_da", width, num_tokens) < lora


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(("width", "num_tokens"), TOO_WIDE)
def test_sb6_what_a_single_module_needs_is_all_that_exceeds_it(width: int, num_tokens: int) -> None:
    """Z and its inverse of the widest module in float64 and its gradient, 16 n² + 4 m n, beside one batch."""
    n, m = width * 3 // 2, width
    least = 16 * n * n + 4 * m * n
    lora = training_peak(width, num_tokens)

    assert building_peak("lora_sb", width, num_tokens) < lora
    assert least < building_peak("lora_da", width, num_tokens) < 1.35 * least


@pytest.mark.parametrize(("method", "tolerance"), [("lora_sb", 1e-3), ("lora_da", 0.7)])
def test_what_a_tight_bound_costs(method: str, tolerance: float) -> None:
    """288 wide and 64 tokens, of √8: float32 for LoRA-SB, iteration instead of eigh for LoRA-DA."""
    base, calibration = small_model(num_layers=1, hidden=288), small_calibration(1, lengths=(64,))
    exact = {"svd": "exact"} if method == "lora_sb" else {"solver": "eigh"}
    tight = build_basis(base, method=method, rank=8, calibration=calibration)
    free = build_basis(base, method=method, rank=8, calibration=calibration, statistics_bytes=2**40, **exact)

    distances = [chordal(a, b) for a, b in zip(tight.A, free.A, strict=True)]
    assert max(distances) < tolerance, distances
