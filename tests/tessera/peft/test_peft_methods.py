"""What the table of PEFT's methods says works, and what it does not recommend does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tessera.errors import InvalidInput
from tessera.formats.manifest import ModuleShape
from tessera.methods.building.losses import attached
from tessera.model.base_model import BaseModel
from tessera.peft.importing import read_adapter, to_single_adapter
from tessera.peft.methods import WAYS, Way

PROMPT = torch.tensor([[1, 5, 9, 33, 2]])
TARGETS = ["q_proj", "v_proj"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

#: A small adapter of each method that PEFT can apply to linear layers.
CONFIGS: dict[str, peft.PeftConfig] = {
    "ADALORA": peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=TARGETS, init_lora_weights=False
    ),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS, init_weights=False),
    "C3A": peft.C3AConfig(block_size=8, target_modules=TARGETS, init_weights=False),
    "DEFT": peft.DeftConfig(target_modules=TARGETS),
    "DELORA": peft.DeloraConfig(r=4, target_modules=TARGETS, init_weights=False),
    "FOURIERFT": peft.FourierFTConfig(n_frequency=20, target_modules=TARGETS, init_weights=False),
    "FROD": peft.FrodConfig(target_modules=TARGETS),
    "GLORA": peft.GloraConfig(target_modules=TARGETS),
    "GRALORA": peft.GraloraConfig(r=4, gralora_k=2, target_modules=TARGETS, init_weights=False),
    "HIRA": peft.HiraConfig(r=4, target_modules=TARGETS),
    "HRA": peft.HRAConfig(r=4, target_modules=TARGETS, init_weights=False),
    "IA3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=[], init_ia3_weights=False),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "LOHA": peft.LoHaConfig(r=4, target_modules=TARGETS, init_weights=False),
    "LOKR": peft.LoKrConfig(r=4, target_modules=TARGETS, init_weights=False),
    "LORA": peft.LoraConfig(r=4, target_modules=TARGETS),
    "MISS": peft.MissConfig(r=4, target_modules=TARGETS, init_weights=False),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS, init_weights=False),
    "OSF": peft.OSFConfig(target_modules=TARGETS),
    "PEANUT": peft.PeanutConfig(target_modules=TARGETS),
    "PSOFT": peft.PsoftConfig(r=4, target_modules=TARGETS),
    "PVERA": peft.PveraConfig(r=4, target_modules=["q_proj"]),
    "RANDLORA": peft.RandLoraConfig(r=4, target_modules=TARGETS, init_weights=False),
    "ROAD": peft.RoadConfig(group_size=8, target_modules=TARGETS),
    "SHIRA": peft.ShiraConfig(r=4, target_modules=TARGETS),
    "SUPERTUNING": peft.SupertuningConfig(target_modules=TARGETS),
    "TINYLORA": peft.TinyLoraConfig(r=4, target_modules=TARGETS),
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1]),
    "UNILORA": peft.UniLoraConfig(target_modules=TARGETS),
    "VBLORA": peft.VBLoRAConfig(r=2, num_vectors=12, vector_length=8, topk=2, target_modules=TARGETS),
    "VERA": peft.VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "WAVEFT": peft.WaveFTConfig(n_frequency=20, target_modules=TARGETS, init_weights=False),
}
#: Variants of the type LORA that can only be merged.
VARIANTS: dict[str, peft.PeftConfig] = {
    "use_dora": peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True, init_lora_weights=False),
    "kasa_config": peft.LoraConfig(
        r=4, target_modules=TARGETS, kasa_config=peft.KasaConfig(), init_lora_weights=False
    ),
}
#: Needs scikit-learn, which is not a dependency; its merging was read in PEFT's code.
UNTRIED = {"ADAMSS"}
#: Methods that are retrained and that PEFT can apply to this model: neither of the other ways exists.
WITHOUT_A_WAY: dict[str, peft.PeftConfig] = {
    "BEFT": peft.BeftConfig(target_modules=TARGETS),
    "LILY": peft.LilyConfig(target_modules=TARGETS),
}


def of(way: Way) -> list[str]:
    return [name for name, known in WAYS.items() if known is way]


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


def served_logits(folder: Path) -> Tensor:
    """Import the two files in a folder, and return what they compute here."""
    files = [(folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    served = BaseModel("base", "0" * 64, base())
    stored = to_single_adapter(read_adapter(*files, shapes()), model_id=served.model_id)
    with attached(served, stored.basis, stored.adapter.R):
        return logits(served.model)


def refusal(folder: Path, model: peft.PeftModel) -> str:
    model.save_pretrained(folder)
    files = [(folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    with pytest.raises(InvalidInput) as caught:
        read_adapter(*files, shapes())
    return caught.value.message


@pytest.mark.parametrize("method", [method.value for method in peft.PeftType])
def test_every_method_of_peft_is_in_the_table(method: str) -> None:
    """If this fails, PEFT has a method that `tessera/peft/methods.py` lacks: try what PEFT can do with it."""
    assert method in WAYS
    if WAYS[method] in (Way.IMPORTED, Way.CONVERTED, Way.MERGED):
        assert method in CONFIGS or method in UNTRIED
    content = json.dumps({"peft_type": method, "r": 4}).encode()
    with pytest.raises(InvalidInput) as caught:
        read_adapter(content, b"", shapes())
    words = {
        Way.IMPORTED: "too few for a safetensors file",
        Way.CONVERTED: "peft.save_as_lora(folder, model, rank=1.0)",
        Way.MERGED: "merge_and_unload",
        Way.RETRAINED: "train a LORA instead",
    }
    assert words[WAYS[method]] in caught.value.message
    assert caught.value.param == (
        "adapter_model" if WAYS[method] is Way.IMPORTED else "adapter_config.peft_type"
    )


def test_the_table_has_no_method_that_peft_lacks() -> None:
    assert set(WAYS) == {method.value for method in peft.PeftType}


def test_a_method_of_tomorrow_is_refused_with_something_to_try() -> None:
    with pytest.raises(InvalidInput, match="unknown here; if PEFT knows it, try"):
        read_adapter(b'{"peft_type": "QUANTUM_LORA"}', b"", shapes())


@pytest.mark.parametrize("method", of(Way.IMPORTED))
def test_what_is_imported_has_the_same_logits(tmp_path: Path, method: str) -> None:
    model = trained(CONFIGS[method])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(served_logits(tmp_path), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", of(Way.CONVERTED))
def test_what_save_as_lora_converts_is_imported_with_the_same_logits(tmp_path: Path, method: str) -> None:
    model = trained(CONFIGS[method])
    expected = logits(model)
    assert "peft.save_as_lora" in refusal(tmp_path / "own", model)

    peft.save_as_lora(tmp_path / "lora", model, rank=1.0)  # keeps all that was learned

    assert (expected - logits(base())).abs().max() > 0.01
    torch.testing.assert_close(served_logits(tmp_path / "lora"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [name for name in of(Way.MERGED) if name not in UNTRIED])
def test_what_cannot_be_converted_can_be_merged(tmp_path: Path, method: str) -> None:
    model = trained(CONFIGS[method])
    expected = logits(model)
    assert (expected - logits(base())).abs().max() > 1e-4
    assert "merge_and_unload" in refusal(tmp_path / "own", model)
    with pytest.raises(TypeError, match="LoRA conversion"):
        peft.save_as_lora(tmp_path / "lora", model, rank=1.0)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_that_are_refused_can_be_merged(tmp_path: Path, variant: str) -> None:
    model = trained(VARIANTS[variant])
    expected = logits(model)
    assert "merge_and_unload" in refusal(tmp_path, model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", WITHOUT_A_WAY)
def test_what_has_to_be_trained_again_can_be_neither_converted_nor_merged(
    tmp_path: Path, method: str
) -> None:
    model = trained(WITHOUT_A_WAY[method])
    with pytest.raises(TypeError, match="LoRA conversion"):
        peft.save_as_lora(tmp_path, model, rank=1.0)
    with pytest.raises((ValueError, NotImplementedError)):
        model.merge_and_unload()


def test_psoft_means_another_change_on_another_base(tmp_path: Path) -> None:
    """So the advice says where to convert it: its file holds no factors."""
    model = trained(CONFIGS["PSOFT"])
    message = refusal(tmp_path, model)
    assert "in the dtype of the training" in message
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {name.split(".")[-1] for name in names} == {"weight", "vector_a", "vector_b"}
    delta = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").get_delta_weight(
        "default"
    )
    other = base()
    weight = other.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    moved = peft.PeftModel.from_pretrained(other, tmp_path)
    found = moved.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").get_delta_weight(
        "default"
    )
    assert torch.linalg.matrix_norm(found - delta) > 0.5 * torch.linalg.matrix_norm(delta)


def test_save_as_lora_leaves_out_what_dora_adds(tmp_path: Path) -> None:
    """So a refusal of DoRA must not recommend it. If this test fails one day, it may."""
    model = trained(VARIANTS["use_dora"])
    expected = logits(model)
    peft.save_as_lora(tmp_path, model, rank=1.0)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert (logits(loaded) - expected).abs().max() > 0.01
