"""A TinyLoRA that PEFT saved gives the same logits here; what PEFT would make again is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tessera.defaults import BUNDLED_MODEL
from tessera.errors import BasisMismatch, InvalidInput
from tessera.formats.adapter import Adapter
from tessera.formats.manifest import ModuleShape
from tessera.formats.single_adapter import SingleAdapter
from tessera.methods.bases import build_basis
from tessera.methods.building.losses import attached
from tessera.model.base_model import BaseModel, linear_layers, make_linear
from tessera.model.layout import linear_shapes
from tessera.peft.exporting import to_peft
from tessera.peft.importing import read_adapter, to_single_adapter
from tessera.peft.tinylora import TinyLora, groups_of
from tessera.peft.tinylora_export import to_tinylora

PROMPT = torch.tensor([[1, 5, 9, 33, 2]])
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
Config = dict[str, Any]
Tensors = dict[str, Tensor]


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes, **heads)).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def shapes_of(model: nn.Module) -> dict[str, ModuleShape]:
    make_linear(model)
    return {n: ModuleShape(n, m.in_features, m.out_features) for n, m in linear_layers(model).items()}


SHAPES = shapes_of(llama())


def trained(model: nn.Module, **options: Any) -> peft.PeftModel:
    made = peft.get_peft_model(model, peft.TinyLoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return made


def saved(model: peft.PeftModel, folder: Path) -> tuple[bytes, bytes]:
    model.save_pretrained(folder)
    return (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(PROMPT).logits
    return found


def served(model: nn.Module, stored: SingleAdapter) -> Tensor:
    make_linear(model)
    base = BaseModel("base", "0" * 64, model)  # type: ignore[arg-type]
    with attached(base, stored.basis, stored.adapter.R):
        return logits(model)


def imported(files: tuple[bytes, bytes], shapes: dict[str, ModuleShape] = SHAPES) -> SingleAdapter:
    return to_single_adapter(read_adapter(*files, shapes), model_id="0" * 64)


CASES: dict[str, Config] = {
    "as the paper": {"r": 2, "u": 13, "weight_tying": 1.0, "target_modules": "all-linear"},
    "a vector each": {"r": 4, "u": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "lopsided groups": {"r": 4, "u": 5, "weight_tying": 0.4,
                        "target_modules": ["q_proj", "down_proj", "v_proj"]},
    "a rank above a side": {"r": 24, "u": 7, "weight_tying": 0.5, "target_modules": ["q_proj", "k_proj"]},
    "more vectors than numbers of R": {"r": 2, "u": 64, "target_modules": ["o_proj"]},
    "a regular expression": {"r": 3, "u": 4, "weight_tying": 0.7, "target_modules": r".*\.(q|up)_proj"},
    "one layer": {"r": 3, "u": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "another seed and dropout": {"r": 3, "u": 4, "target_modules": ["q_proj"], "projection_seed": 7,
                                 "tinylora_dropout": 0.5, "init_weights": "uniform"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(tmp_path: Path, case: str) -> None:
    files = saved(trained(llama(), **CASES[case]), tmp_path)
    expected = logits(peft.PeftModel.from_pretrained(llama(), tmp_path).eval())
    stored = imported(files)
    assert stored.basis.rank == min(CASES[case]["r"], 24)
    assert (expected - logits(llama())).abs().max() > 0.02
    torch.testing.assert_close(served(llama(), stored), expected, rtol=0, atol=1e-5)
    assert imported(files).basis.basis_id == stored.basis.basis_id


def test_transposed_layers_are_imported_too(tmp_path: Path) -> None:
    options = {"r": 3, "u": 4, "weight_tying": 0.5, "target_modules": ["c_attn", "c_proj"]}
    files = saved(trained(gpt2(), **options), tmp_path)
    expected = logits(peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval())
    assert json.loads(files[0])["fan_in_fan_out"] is True
    stored = imported(files, shapes_of(gpt2()))
    torch.testing.assert_close(served(gpt2(), stored), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_in_half_precision_is_exact_for_what_it_holds(tmp_path: Path, dtype: torch.dtype) -> None:
    config, model = saved(trained(llama(), r=4, u=5, target_modules=["q_proj", "v_proj"]), tmp_path)
    rounded = {name: value.to(dtype) for name, value in safetensors.torch.load(model).items()}
    again = (config, safetensors.torch.save(rounded))
    lora = read_adapter(*again, SHAPES)
    assert isinstance(lora, TinyLora)
    stored = to_single_adapter(lora, model_id="0" * 64)
    assert stored.basis.manifest.dtype == "float16"
    for index, module in enumerate(lora.modules.values()):
        expected = module.B.double() @ lora.core(module) @ module.A.double()
        found = (
            stored.basis.B[index].double() @ stored.adapter.R[index].double() @ stored.basis.A[index].double()
        )
        assert torch.linalg.matrix_norm(found - expected) < 1e-3 * torch.linalg.matrix_norm(expected)


def test_a_file_means_the_same_on_another_base_model(tmp_path: Path) -> None:
    """The frozen factors are in the file: nothing is decomposed again."""
    files = saved(trained(llama(), r=4, u=5, target_modules=["q_proj", "v_proj"]), tmp_path)
    expected = logits(peft.PeftModel.from_pretrained(llama(seed=3), tmp_path).eval())
    torch.testing.assert_close(served(llama(seed=3), imported(files)), expected, rtol=0, atol=1e-5)


def test_users_of_one_model_share_the_basis_and_are_stored_as_their_vectors(tmp_path: Path) -> None:
    options: Config = {"r": 2, "u": 13, "weight_tying": 1.0, "target_modules": "all-linear"}
    first, second, third = (trained(llama(), **options, **more) for more in ({}, {}, {"projection_seed": 9}))
    vector = next(p for n, p in second.named_parameters() if "tinylora_v" in n)
    vector.data *= -2
    expected = logits(second)
    one, other, another = (
        imported(saved(model, tmp_path / str(place))) for place, model in enumerate((first, second, third))
    )
    assert one.basis.basis_id == other.basis.basis_id != another.basis.basis_id
    blob = other.adapter.to_bytes(version=1, dtype=torch.float32)
    assert len(blob) == 128 + len(json.dumps(other.adapter.metadata, separators=(",", ":"))) + 4 * 13
    again = Adapter.from_bytes(blob, cores=one.basis.cores)
    assert torch.equal(again.R, other.adapter.R)
    assert again.trained is not None
    assert torch.equal(again.trained.flatten(), vector.data)
    torch.testing.assert_close(served(llama(), SingleAdapter(one.basis, again)), expected, rtol=0, atol=1e-5)


def test_a_weight_of_low_rank_is_imported(tmp_path: Path) -> None:
    """Its singular values are 0 from some place on, and so are rows of A and columns of B."""

    def flat() -> LlamaForCausalLM:
        model = llama()
        weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
        weight.data[:] = torch.outer(torch.arange(32) / 100, torch.ones(32))
        weight.data[:, 5:] = 0
        return model

    files = saved(trained(flat(), r=4, u=5, target_modules=["q_proj"]), tmp_path)
    tensors = safetensors.torch.load(files[1])
    name = "base_model.model.model.layers.0.self_attn.q_proj.tinylora_A"
    tensors[name][1:] = 0  # as exact arithmetic gives it
    files = (files[0], safetensors.torch.save(tensors))
    (tmp_path / "adapter_model.safetensors").write_bytes(files[1])
    expected = logits(peft.PeftModel.from_pretrained(flat(), tmp_path).eval())
    torch.testing.assert_close(served(flat(), imported(files)), expected, rtol=0, atol=1e-5)


def test_an_import_is_exported_as_a_lora_with_the_same_logits(tmp_path: Path) -> None:
    files = saved(trained(llama(), **CASES["lopsided groups"]), tmp_path)
    expected = logits(peft.PeftModel.from_pretrained(llama(), tmp_path).eval())
    stored = imported(files)
    for name, content in to_peft(stored.basis, stored.adapter, base_model="tiny").items():
        (tmp_path / name).write_bytes(content)
    exported = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(exported), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight_tying", [0.0, 0.05, 0.3, 0.4, 0.5, 0.75, 0.95, 1.0])
def test_groups_are_those_of_peft(weight_tying: float) -> None:
    made = trained(llama(), r=2, u=3, weight_tying=weight_tying, target_modules="all-linear")
    layers = [m for _, m in made.named_modules() if isinstance(m, peft.tuners.tinylora.Linear)]
    expected = [int(layer._tinylora_v_key["default"]) for layer in layers]
    assert groups_of(len(layers), weight_tying) == expected


def test_the_shape_of_groups_at_60_modules() -> None:
    groups = groups_of(60, 0.4)
    assert [groups.count(group) for group in range(36)] == [1] * 35 + [25]


@pytest.mark.parametrize(
    "case",
    ["as the paper", "a vector each", "a rank above a side", "a regular expression", "lopsided groups"],
)
def test_an_import_is_exported_as_a_tinylora_again(tmp_path: Path, case: str) -> None:
    original = saved(trained(llama(), **CASES[case]), tmp_path / "in")
    expected = logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "in").eval())
    stored = imported(original)
    exported = to_tinylora(stored.basis, stored.adapter, base_model="tiny")
    (tmp_path / "out").mkdir()
    for name, content in exported.items():
        (tmp_path / "out" / name).write_bytes(content)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    vectors = [name for name in safetensors.torch.load(exported.adapter_model) if "tinylora_v" in name]
    given = [name for name in safetensors.torch.load(original[1]) if "tinylora_v" in name]
    assert sorted(vectors) == sorted(given)
    again = imported((exported.adapter_config, exported.adapter_model))
    torch.testing.assert_close(served(llama(), again), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight_tying", [0.0, 0.5, 0.6, 1.0])
def test_what_was_trained_here_goes_on_in_peft(tmp_path: Path, weight_tying: float) -> None:
    """With groups that PEFT does not make (here at 0.6), each module gets a copy of its vector."""
    base = BaseModel("base", "0" * 64, llama())
    targets = ["q_proj", "v_proj", "down_proj", "up_proj", "o_proj"]
    basis = build_basis(
        base, method="tinylora", rank=3, target_modules=targets, num_vectors=4, weight_tying=weight_tying
    )
    v = torch.randn(basis.cores.shape, generator=torch.Generator().manual_seed(2))
    R = basis.cores.expand(v.double()).float()
    exported = to_tinylora(basis, Adapter(basis.basis_id, R, trained=v), base_model="tiny")
    for name, content in exported.items():
        (tmp_path / name).write_bytes(content)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    with attached(base, basis, R):
        expected = logits(base.model)
    assert (expected - logits(llama())).abs().max() > 0.02
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    trainable = [p for p in loaded.parameters() if p.requires_grad]
    assert {p.numel() for p in trainable} == {4}
    assert len(trainable) == (10 if weight_tying == 0.6 else basis.cores.shape[1])


def test_what_is_no_tinylora_is_not_exported_as_one() -> None:
    base = BaseModel("base", "0" * 64, llama())
    basis = build_basis(base, method="tinylora", rank=3, num_vectors=4)
    R = torch.zeros(basis.num_modules, 3, 3)
    with pytest.raises(InvalidInput, match="export it as LORA"):
        to_tinylora(basis, Adapter(basis.basis_id, R), base_model="tiny")
    with pytest.raises(BasisMismatch):
        to_tinylora(basis, Adapter("1" * 64, R), base_model="tiny")


# What is refused


def files(folder: Path, **options: Any) -> tuple[Config, Tensors]:
    given = {"r": 4, "u": 5, "weight_tying": 0.5, "target_modules": ["q_proj", "v_proj"], **options}
    config, model = saved(trained(llama(), **given), folder)
    return json.loads(config), safetensors.torch.load(model)


def refusal(config: Config, tensors: Tensors) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        read_adapter(json.dumps(config).encode(), safetensors.torch.save(tensors), SHAPES)
    assert caught.value.code == "invalid_peft_adapter"
    caught.value.message.encode()
    return caught.value


def test_a_file_without_p_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    config, tensors = files(tmp_path, save_projection=False)
    assert not any("tinylora_P" in name for name in tensors)
    error = refusal(config, tensors)
    assert error.param == "adapter_config.save_projection"
    assert "projection_seed" in error.message
    assert "save_pretrained" in error.message
    expected = logits(peft.PeftModel.from_pretrained(llama(), tmp_path).eval())

    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "save_projection": True}))
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    stored = imported(saved(loaded, tmp_path / "again"))
    torch.testing.assert_close(served(llama(), stored), expected, rtol=0, atol=1e-5)


def test_p_is_not_believed_where_peft_does_not_read_it(tmp_path: Path) -> None:
    """PEFT ignores the file's P if save_projection is false; the seed then decides."""
    config, tensors = files(tmp_path)
    expected = logits(peft.PeftModel.from_pretrained(llama(), tmp_path).eval())
    changed = {**config, "save_projection": False, "projection_seed": 7}
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    other = logits(peft.PeftModel.from_pretrained(llama(), tmp_path).eval())
    assert (other - expected).abs().max() > 0.01
    assert refusal(changed, tensors).param == "adapter_config.save_projection"


def test_the_seed_changes_nothing_while_p_is_in_the_file(tmp_path: Path) -> None:
    config, tensors = files(tmp_path)
    model = safetensors.torch.save(tensors)
    first = imported((json.dumps(config).encode(), model))
    second = imported((json.dumps({**config, "projection_seed": 7}).encode(), model))
    assert torch.equal(first.adapter.R, second.adapter.R)


CONFIGS: dict[str, Any] = {
    "task_type": "SEQ_CLS", "bias": "all", "modules_to_save": ["lm_head"], "r": 0, "u": True, "new_trick": 3,
    "weight_tying": 1.5, "target_modules": 7, "save_projection": None,
}  # fmt: skip


@pytest.mark.parametrize("key", CONFIGS)
def test_a_config_that_cannot_be_represented_is_named(tmp_path: Path, key: str) -> None:
    config, tensors = files(tmp_path)
    error = refusal({**config, key: CONFIGS[key]}, tensors)
    assert error.param == f"adapter_config.{key}"


Q = "base_model.model.model.layers.0.self_attn.q_proj"
V1 = "base_model.model.model.layers.1.self_attn.v_proj"


def without(*parts: str) -> Any:
    return lambda t: {name: value for name, value in t.items() if not any(part in name for part in parts)}


SPOILED: dict[str, tuple[Any, str]] = {
    "no vector 0": (without("tinylora_v.0"), "has 1 vectors v, but weight_tying makes 2 groups"),
    "a vector too many": (lambda t: {**t, "base_model.tinylora_v.2": torch.ones(5)}, "3 vectors v, but"),
    "no vector": (without("tinylora_v"), "has 0 vectors v"),
    "P of one module": (without(f"{Q}.tinylora_P"), "lacks tinylora_P of .*q_proj.*save_projection true"),
    "A of one module": (without(f"{Q}.tinylora_A"), "lacks tinylora_A of .*save_pretrained"),
    "a module": (without(V1), "lacks the tensors of model.layers.1.self_attn.v_proj"),
    "nothing": (lambda t: {}, "holds no TinyLoRA"),
    "two adapters": (
        lambda t: {**t, f"{Q}.tinylora_A.other": torch.ones(4, 32)}, "mean the same|several adapters"
    ),
    "a LoRA beside it": (lambda t: {**t, f"{Q}.lora_A.weight": torch.ones(4, 32)}, "lora_A.weight"),
    "an embedding": (
        lambda t: {**t, "base_model.model.model.embed_tokens.tinylora_A": torch.ones(4, 32)},
        "embed_tokens, which is not a linear layer",
    ),
    "the head": (
        lambda t: {**t, "base_model.model.lm_head.tinylora_A": torch.ones(4, 32)}, "lm_head, which is not",
    ),
    "a wide A": (lambda t: {**t, f"{Q}.tinylora_A": torch.ones(4, 33)}, r"\[4, 33\].*\[4, 32\]"),
    "P of another length": (lambda t: {**t, f"{Q}.tinylora_P": torch.ones(6, 4, 4)}, r"\[6, 4, 4\]"),
    "v of another length": (lambda t: {**t, "base_model.tinylora_v.0": torch.ones(6)}, r"\[6\]; .*\[5\]"),
    "integers": (lambda t: {**t, "base_model.tinylora_v.0": torch.ones(5).int()}, "I32, not as F32"),
    "infinite": (lambda t: {**t, "base_model.tinylora_v.0": torch.ones(5) / 0}, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    change, words = SPOILED[case]
    config, tensors = files(tmp_path)
    error = refusal(config, change(tensors))
    assert error.param == "adapter_model"
    assert re.search(words, error.message), error.message


def test_a_module_that_peft_would_ignore_is_refused(tmp_path: Path) -> None:
    config, tensors = files(tmp_path)
    error = refusal({**config, "target_modules": ["q_proj"]}, tensors)
    assert "which target_modules does not name" in error.message


def test_an_embedding_of_a_real_adapter_is_refused(tmp_path: Path) -> None:
    config, tensors = files(tmp_path, target_modules=["q_proj", "embed_tokens"])
    assert "embed_tokens" in refusal(config, tensors).message


def test_names_of_a_state_dict_are_read(tmp_path: Path) -> None:
    config, tensors = files(tmp_path)
    renamed = {}
    for name, value in tensors.items():
        plain = name.removeprefix("base_model.model.").removeprefix("base_model.")
        renamed[
            plain.replace("tinylora_v.", "tinylora_v.default.") if "_v" in plain else f"{plain}.default"
        ] = value
    first, second = (
        imported((json.dumps(config).encode(), safetensors.torch.save(t))) for t in (tensors, renamed)
    )
    assert torch.equal(first.adapter.R, second.adapter.R)


def test_the_bundled_model_gives_the_logits_of_peft(tmp_path: Path) -> None:
    def tiny() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()

    options = {"r": 2, "u": 13, "weight_tying": 1.0, "target_modules": "all-linear"}
    files = saved(trained(tiny(), **options), tmp_path)
    expected = logits(peft.PeftModel.from_pretrained(tiny(), tmp_path).eval())
    stored = imported(files, linear_shapes(BUNDLED_MODEL))
    assert (expected - logits(tiny())).abs().max() > 0.05
    torch.testing.assert_close(served(tiny(), stored), expected, rtol=0, atol=5e-5)
