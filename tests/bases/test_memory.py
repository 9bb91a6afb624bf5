"""What building a basis needs in memory (methods catalogue SB6, issue 3's bound)."""

from __future__ import annotations

import peft
import pytest
import torch

from adapter_core.base_model import LLAMA_LINEARS as LINEARS
from adapter_core.bases import build_basis
from adapter_core.bases.collected import Needs
from adapter_core.bases.gradients import collect
from adapter_core.bases.targets import find_targets
from tests.bases.matrices import small_calibration, small_model
from tests.bases.memory import peak_bytes


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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_sb6_building_needs_less_memory_than_training_lora() -> None:
    """Issue 3: LoRA-SB and LoRA-DA never exceed the peak of training LoRA on the same batch."""
    calibration = small_calibration(16, lengths=(64,))
    base = small_model(num_layers=3, hidden=96)
    peaks = {
        method: peak_bytes(lambda m=method: build_basis(base, method=m, rank=8, calibration=calibration))
        for method in ("lora_sb", "lora_da")
    }
    config = peft.LoraConfig(r=8, target_modules=list(LINEARS))
    model = peft.get_peft_model(small_model(num_layers=3, hidden=96).model, config)

    def train() -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-4)
        for batch in calibration.batches():
            labels = torch.where(batch.labels, batch.token_ids, -100)
            model(input_ids=batch.token_ids, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    lora = peak_bytes(train)
    assert peaks["lora_sb"] < lora
    assert peaks["lora_da"] < lora
