"""The conversions that refusals of PEFT methods recommend work, and those they do not recommend do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tessera.errors import InvalidInput
from tessera.formats.manifest import ModuleShape
from tessera.methods.building.losses import attached
from tessera.model.base_model import BaseModel
from tessera.peft.importing import read_peft, to_single_adapter

PROMPT = torch.tensor([[1, 5, 9, 33, 2]])
TARGETS = ["q_proj", "v_proj"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

CONVERTED: dict[str, peft.PeftConfig] = {
    "LOHA": peft.LoHaConfig(r=4, target_modules=TARGETS, init_weights=False),
    "LOKR": peft.LoKrConfig(r=4, target_modules=TARGETS, init_weights=False),
    "VERA": peft.VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "TINYLORA": peft.TinyLoraConfig(r=4, target_modules=TARGETS),
    "PSOFT": peft.PsoftConfig(r=4, target_modules=TARGETS),
    "MISS": peft.MissConfig(r=4, target_modules=TARGETS, init_weights=False),
    "DELORA": peft.DeloraConfig(r=4, target_modules=TARGETS, init_weights=False),
}
MERGED: dict[str, peft.PeftConfig] = {
    "ADALORA": peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=TARGETS, init_lora_weights=False
    ),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS, init_weights=False),
    "IA3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=[], init_ia3_weights=False),
    "use_dora": peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True, init_lora_weights=False),
    "kasa_config": peft.LoraConfig(
        r=4, target_modules=TARGETS, kasa_config=peft.KasaConfig(), init_lora_weights=False
    ),
}


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads)).eval()


def shapes() -> dict[str, ModuleShape]:
    linears = [(n, m) for n, m in base().named_modules() if isinstance(m, torch.nn.Linear)]
    return {n: ModuleShape(n, m.in_features, m.out_features) for n, m in linears if n != "lm_head"}


def trained(config: peft.PeftConfig) -> peft.PeftModel:
    model = peft.get_peft_model(base(), config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(PROMPT).logits
    return found


def refusal(folder: Path, model: peft.PeftModel) -> str:
    model.save_pretrained(folder)
    files = [(folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    with pytest.raises(InvalidInput) as caught:
        read_peft(*files, shapes())
    return caught.value.message


@pytest.mark.parametrize("method", CONVERTED)
def test_what_save_as_lora_converts_is_imported_with_the_same_logits(tmp_path: Path, method: str) -> None:
    model = trained(CONVERTED[method])
    expected = logits(model)
    assert "peft.save_as_lora" in refusal(tmp_path / "own", model)

    peft.save_as_lora(tmp_path / "lora", model, rank=1.0)  # keeps all that was learned

    files = [tmp_path / "lora" / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    served = BaseModel("base", "0" * 64, base())
    lora = read_peft(*(file.read_bytes() for file in files), shapes())
    stored = to_single_adapter(lora, model_id=served.model_id)
    with attached(served, stored.basis, stored.adapter.R):
        found = logits(served.model)
    assert (expected - logits(base())).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", MERGED)
def test_what_cannot_be_converted_can_be_merged(tmp_path: Path, method: str) -> None:
    model = trained(MERGED[method])
    expected = logits(model)
    assert "merge_and_unload" in refusal(tmp_path, model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_save_as_lora_leaves_out_what_dora_adds(tmp_path: Path) -> None:
    """So a refusal of DoRA must not recommend it. If this test fails one day, it may."""
    model = trained(MERGED["use_dora"])
    expected = logits(model)
    peft.save_as_lora(tmp_path, model, rank=1.0)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert (logits(loaded) - expected).abs().max() > 0.01
