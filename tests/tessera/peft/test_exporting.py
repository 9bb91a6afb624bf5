"""An exported adapter, loaded by PEFT itself, gives the logits of the merged model."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tessera.defaults import BUNDLED_MODEL
from tessera.errors import BasisMismatch, InvalidInput
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.formats.head import ClassificationHead
from tessera.peft.exporting import to_peft

PROMPT = torch.tensor([[1, 17, 250, 999, 4000, 12]])


#: PEFT 0.21 still reads a property that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_loads_an_export_with_the_same_logits(tiny_basis: Basis, tmp_path: Path) -> None:
    R = 0.5 * torch.randn(tiny_basis.num_modules, 8, 8, generator=torch.Generator().manual_seed(0))
    adapter = Adapter(tiny_basis.basis_id, R)
    for name, content in to_peft(tiny_basis, adapter, base_model=str(BUNDLED_MODEL)).items():
        (tmp_path / name).write_bytes(content)
    merged = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    base_logits = merged(PROMPT).logits
    for index, module in enumerate(tiny_basis.manifest.modules):
        weight = merged.get_submodule(module.name).weight
        weight.data += tiny_basis.B[index] @ R[index] @ tiny_basis.A[index]

    fresh = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    exported = peft.PeftModel.from_pretrained(fresh, tmp_path)

    expected = merged(PROMPT).logits
    torch.testing.assert_close(exported(PROMPT).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - base_logits).abs().max() > 0.5


def test_an_adapter_of_another_basis_is_refused(tiny_basis: Basis) -> None:
    adapter = Adapter("0" * 64, torch.zeros(tiny_basis.num_modules, 8, 8))

    with pytest.raises(BasisMismatch, match="0000"):
        to_peft(tiny_basis, adapter, base_model="tiny")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_loads_a_classifier_with_the_same_scores(tiny_basis: Basis, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    merged = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    weight = torch.randn(3, merged.config.hidden_size + 1, generator=generator)
    weight[:, -1] = 0
    head = ClassificationHead(weight, ("a", "b", "c"))
    R = 0.5 * torch.randn(tiny_basis.num_modules, 8, 8, generator=generator)
    adapter = Adapter(tiny_basis.basis_id, R, {}, head)
    for name, content in to_peft(tiny_basis, adapter, base_model=str(BUNDLED_MODEL)).items():
        (tmp_path / name).write_bytes(content)
    for index, module in enumerate(tiny_basis.manifest.modules):
        linear = merged.get_submodule(module.name)
        linear.weight.data += tiny_basis.B[index] @ R[index] @ tiny_basis.A[index]

    fresh = AutoModelForSequenceClassification.from_pretrained(
        BUNDLED_MODEL, num_labels=3, dtype=torch.float32
    )
    exported = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.inference_mode():
        scores = head.scores(merged.model(PROMPT).last_hidden_state[:, -1])
        torch.testing.assert_close(exported(PROMPT).logits, scores, atol=1e-3, rtol=1e-4)

    weight[0, -1] = 1
    biased = Adapter(tiny_basis.basis_id, R, {}, ClassificationHead(weight, head.labels))
    with pytest.raises(InvalidInput, match="bias"):
        to_peft(tiny_basis, biased, base_model="tiny")
