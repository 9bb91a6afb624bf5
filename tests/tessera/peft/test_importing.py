"""LoRAs saved by PEFT give the same logits here; what cannot be represented is refused by name."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from tessera.defaults import BUNDLED_MODEL
from tessera.errors import InvalidInput
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.formats.manifest import ModuleShape
from tessera.formats.single_adapter import LowRank, SingleAdapter, stored_rank
from tessera.methods.building.losses import attached
from tessera.model.base_model import BaseModel
from tessera.model.layout import linear_shapes
from tessera.peft.config import parse_config
from tessera.peft.exporting import to_peft
from tessera.peft.importing import core_in, read_peft, to_single_adapter

PROMPT = torch.tensor([[1, 17, 250, 999, 4000, 12]])
#: PEFT 0.21 still reads a property that transformers 5.23 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module:UserWarning"),
]


@pytest.fixture(scope="module")
def shapes() -> dict[str, ModuleShape]:
    return linear_shapes(BUNDLED_MODEL)


def saved_by_peft(folder: Path, dtype: torch.dtype, **options: Any) -> tuple[bytes, bytes, Tensor]:
    """Make the two files of a LoRA with random factors, and the logits that PEFT computes from them."""
    torch.manual_seed(5)
    fresh = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    made = peft.get_peft_model(fresh, peft.LoraConfig(**options))
    for name, parameter in made.named_parameters():
        if "lora_" in name and parameter.ndim == 2:
            parameter.data = (0.3 * torch.randn(parameter.shape) / parameter.shape[1] ** 0.5).to(dtype)
    made.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(again, folder)
    with torch.no_grad():
        logits: Tensor = loaded(PROMPT).logits
    files = [(folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    return files[0], files[1], logits


def served_logits(base: BaseModel, stored: SingleAdapter) -> Tensor:
    with torch.no_grad(), attached(base, stored.basis, stored.adapter.R):
        logits: Tensor = base.model(PROMPT).logits
    return logits


CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "all linear": (torch.float32, {"r": 5, "lora_alpha": 20, "target_modules": "all-linear"}),
    "one module": (torch.bfloat16, {"r": 8, "target_modules": ["model.layers.2.mlp.down_proj"]}),
    "ranks and alphas": (
        torch.float32,
        {
            "r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"up_proj": 9, "layers.1.self_attn.q_proj": 2, "^model.layers.0.*v_proj": 7},
            "alpha_pattern": {"v_proj": 3.5, "model.layers.1.self_attn.q_proj": 40},
        },
    ),
    "half": (torch.float16, {"r": 16, "target_modules": ["o_proj"], "init_lora_weights": "Gaussian"}),
    "MiCA": (torch.float32, {"r": 8, "target_modules": ["q_proj", "k_proj"], "init_lora_weights": "mica"}),
    "orthogonal": (torch.float32, {"r": 4, "target_modules": ["v_proj"], "init_lora_weights": "orthogonal"}),
    "layers": (
        torch.float32,
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
    ),
    "patterns": (
        torch.float32,
        {
            "r": 4, "target_modules": r"model\.layers\.[0-3]\..*(q|up)_proj", "exclude_modules": r".*\.2\..*",
            "rank_pattern": {r"(?:layers\.(0|1)|none)\.(?i:SELF_attn)\.q_proj": 6, r"\d+\.mlp\.\w+": 3},
            "alpha_pattern": {r"((q|r)_proj|x){1,2}": 11, ".*": 5}, "use_rslora": True,
        },
    ),
    "more than k_proj has room for": (
        torch.float32, {"r": 160, "lora_alpha": 40, "target_modules": ["q_proj", "k_proj"]}
    ),
    "only k_proj": (torch.bfloat16, {"r": 140, "lora_alpha": 99, "target_modules": ["k_proj"]}),
    "all beyond their sides": (
        torch.float32,
        {"r": 300, "lora_alpha": 20, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 130}},
    ),
    "velora": (
        torch.float32,
        {"r": 4, "target_modules": ["q_proj"], "velora_config": peft.VeloraConfig(num_groups=8)},
    ),
    "monteclora": (
        torch.float32,
        {"r": 4, "target_modules": ["q_proj"], "monteclora_config": peft.MontecloraConfig()},
    ),
    "transposed storage, said of a layer that has none": (
        torch.float32, {"r": 4, "target_modules": ["q_proj"], "fan_in_fan_out": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(
    tiny: BaseModel, shapes: dict[str, ModuleShape], tmp_path: Path, case: str
) -> None:
    dtype, options = CASES[case]
    config, model, expected = saved_by_peft(tmp_path, dtype, **options)
    lora = read_peft(config, model, shapes)
    stored = to_single_adapter(lora, model_id=tiny.model_id)
    sides = {shape: min(shape.d_in, shape.d_out) for shape in lora.changes}
    ranks = {shape: min(change.rank, sides[shape]) for shape, change in lora.changes.items()}
    assert stored.basis.rank == max(ranks.values())
    assert stored.basis.manifest.method == "peft"
    with torch.no_grad():
        change = float((expected - tiny.model(PROMPT).logits).abs().max())
    assert change > 0.05
    tolerance = 2e-4 if dtype == torch.float32 else 2e-2 * change
    torch.testing.assert_close(served_logits(tiny, stored), expected, rtol=0, atol=tolerance)
    for shape, A, B in zip(stored.basis.manifest.modules, stored.basis.A, stored.basis.B, strict=True):
        for X in (A.double(), B.T.double()):
            room = min(len(X), sides[shape])
            torch.testing.assert_close(X[:room] @ X[:room].T, torch.eye(room).double(), rtol=0, atol=5e-3)
            assert not X[room:].any()
    assert to_single_adapter(lora, model_id=tiny.model_id).basis.basis_id == stored.basis.basis_id


def test_an_untrained_lora_changes_nothing(tiny: BaseModel, shapes: dict[str, ModuleShape]) -> None:
    """With B = 0, the basis is filled up with directions that the core does not use."""
    stored = to_single_adapter(read_peft(*files(), shapes), model_id=tiny.model_id)
    assert not stored.adapter.R.any()
    with torch.no_grad():
        expected = tiny.model(PROMPT).logits
    torch.testing.assert_close(served_logits(tiny, stored), expected, rtol=0, atol=1e-6)


def test_our_own_export_comes_back_in_its_basis(
    tiny: BaseModel, tiny_basis: Basis, shapes: dict[str, ModuleShape]
) -> None:
    R = torch.randn(tiny_basis.num_modules, 8, 8, generator=torch.Generator().manual_seed(0)).half().float()
    adapter = Adapter(tiny_basis.basis_id, R)
    exported = to_peft(tiny_basis, adapter, base_model="tiny")
    lora = read_peft(exported.adapter_config, exported.adapter_model, shapes)
    assert lora.label == tiny_basis.basis_id
    core = core_in(lora, tiny_basis)
    assert core is not None
    torch.testing.assert_close(core, R, rtol=1e-5, atol=1e-5)

    rounded = to_peft(tiny_basis, adapter, base_model="tiny", dtype=torch.bfloat16)
    core = core_in(read_peft(rounded.adapter_config, rounded.adapter_model, shapes), tiny_basis)
    assert core is not None
    torch.testing.assert_close(core, R, rtol=0.02, atol=0.05)


def test_a_false_label_is_not_believed(tiny_basis: Basis, shapes: dict[str, ModuleShape]) -> None:
    R = torch.ones(tiny_basis.num_modules, 8, 8)
    exported = to_peft(tiny_basis, Adapter(tiny_basis.basis_id, R), base_model="tiny")
    label = {"tessera_basis": tiny_basis.basis_id}
    tensors = safetensors.torch.load(exported.adapter_model)
    for name in ("lora_A", "lora_B"):
        forged = {key: value.clone() for key, value in tensors.items()}
        next(value for key, value in forged.items() if name in key)[0] += 0.01
        model = safetensors.torch.save(forged, metadata=label)
        assert core_in(read_peft(exported.adapter_config, model, shapes), tiny_basis) is None
    fewer = {key: value for key, value in tensors.items() if ".layers.0.self_attn.q_proj" not in key}
    model = safetensors.torch.save(fewer, metadata=label)
    assert core_in(read_peft(exported.adapter_config, model, shapes), tiny_basis) is None


# What is refused

Q = "base_model.model.model.layers.0.self_attn.q_proj"  # 256 → 256
K = "base_model.model.model.layers.0.self_attn.k_proj"  # 256 → 128


def pair(name: str = Q, rank: int = 4, d_in: int = 256, d_out: int = 256) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{name}.lora_A.weight": torch.randn(rank, d_in, generator=generator),
        f"{name}.lora_B.weight": torch.zeros(d_out, rank),
    }


def files(tensors: dict[str, Tensor] | None = None, **config: Any) -> tuple[bytes, bytes]:
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    return json.dumps(fields).encode(), safetensors.torch.save(pair() if tensors is None else tensors)


CONFIGS: dict[str, Any] = {
    "peft_type": "VERA", "task_type": "SEQ_CLS", "bias": "lora_only", "use_dora": True, "lora_bias": True,
    "modules_to_save": ["lm_head"], "init_lora_weights": "pissa_niter_4",
    "trainable_token_indices": [1], "layer_replication": [[0, 2]], "target_parameters": ["experts"],
    "use_qalora": True, "alora_invocation_tokens": [5], "arrow_config": {"top_k": 1}, "new_trick": 3,
    "r": 0, "lora_alpha": "high", "use_rslora": "yes", "rank_pattern": [4],
    "alpha_pattern": {"q_proj(?=x)": 3}, "init_lora_weights ": "loftq", "r\ud800": 5,
    "kasa_config": {"beta": 1.0}, "use_bdlora": {"nblocks": 2},
}  # fmt: skip


@pytest.mark.parametrize("key", CONFIGS)
def test_a_config_that_cannot_be_represented_is_named(shapes: dict[str, ModuleShape], key: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_peft(*files(**{key: CONFIGS[key]}), shapes)
    shown = key.encode("ascii", "backslashreplace").decode()
    assert caught.value.param == f"adapter_config.{shown}"
    assert caught.value.code == "invalid_peft_adapter"
    assert f"{shown} is " in caught.value.message
    caught.value.message.encode("utf-8")


PATTERNS = {
    r"(q)\1": "in linear time", r"(?<!k_)proj": "in linear time", r"(?>q)_proj": "in linear time",
    r"(?#x)q": "in linear time", "q{2000}": "in linear time", "\ud800": "in linear time",
    "q_proj(": "not a regular expression", r"\p{L}": "not a regular expression",
    "(?i)q": "not a regular expression",
    "q{,3}": "different meanings", "[[:alpha:]]_proj": "different meanings",
    "q" * 3000: "2000 characters",
    "(" * 1500 + ")" * 1500: "not a regular expression|in linear time|characters",
    ".{0,500}q_proj": "in linear time",  # too large a program
}  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_that_only_backtracking_could_match_is_refused(
    shapes: dict[str, ModuleShape], pattern: str
) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(InvalidInput) as caught:
            read_peft(*files(**{key: {pattern: 4}}), shapes)
        assert caught.value.param == f"adapter_config.{key}"
        assert re.search(PATTERNS[pattern], caught.value.message), caught.value.message
        caught.value.message.encode("utf-8")


PIECES = st.sampled_from(
    ["q_proj", "layers", ".", r"\.", r"\d", "[0-3]", "self_attn", "(?:k|q)", "(a|q)+", ".*", "x?", "^model",
     "$", r"\w+", "(?i:Q)", "[^.]", "_", "(model)?", "|"]
)  # fmt: skip


def rank_of(pattern: str, module: str) -> int | None:
    """Return 7 if the pattern matches the module, 4 if not, None if the pattern is refused."""
    try:
        parsed = parse_config(
            json.dumps({"peft_type": "LORA", "r": 4, "rank_pattern": {pattern: 7}}).encode()
        )
    except InvalidInput:
        return None
    return parsed.rank_of(module)


@settings(max_examples=200)
@given(st.lists(PIECES, min_size=1, max_size=6).map("".join))
def test_patterns_mean_what_they_mean_in_peft(pattern: str) -> None:
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.12.mlp.up_proj", "lm_head", "q_proj"):
        found = rank_of(pattern, module)
        if found is None:  # Python refuses it too, or will interpret it differently in future
            event("refused")
            continue
        key = peft.utils.other.get_pattern_key([pattern, "no pattern"], module)
        assert found == (7 if key == pattern else 4)


def test_too_many_patterns_for_so_many_modules_are_refused(shapes: dict[str, ModuleShape]) -> None:
    patterns = {f"layers.{number}.(a|b|c)+.q_proj": 4 for number in range(4000)}
    parsed = parse_config(json.dumps({"peft_type": "LORA", "rank_pattern": patterns}).encode())
    parsed.check_effort(len(shapes))
    with pytest.raises(InvalidInput, match="4000 patterns, too many to match with 1000 modules"):
        parsed.check_effort(1000)


def test_every_init_of_peft_is_either_imported_or_refused_with_a_way_out(
    shapes: dict[str, ModuleShape],
) -> None:
    for init in (True, False, None, "gaussian", "GAUSSIAN", "eva", "orthogonal", "mica", "MiCA"):
        read_peft(*files(init_lora_weights=init), shapes)
    for init in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"):
        with pytest.raises(InvalidInput, match="path_initial_model_for_weight_conversion"):
            read_peft(*files(init_lora_weights=init), shapes)
    for init in ("EVA", "kaiming", 1, ["mica"], ""):
        with pytest.raises(InvalidInput, match="does not know this initialisation"):
            read_peft(*files(init_lora_weights=init), shapes)


def test_the_name_of_the_method_may_be_written_small(shapes: dict[str, ModuleShape]) -> None:
    """`tests/tessera/peft/test_peft_methods.py` has all methods."""
    read_peft(*files(peft_type="lora"), shapes)


def test_keys_of_other_trainers_do_not_disturb(shapes: dict[str, ModuleShape]) -> None:
    swift = {"lora_dtype": "bfloat16", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6}
    unsloth = {"auto_mapping": {"base_model_class": "X", "unsloth_fixed": True}, "unsloth_version": "2026.9"}
    later = {"a_key_of_tomorrow": None, "another": False, "some_config": {}, "merge_weights": True}
    read_peft(*files(**swift, **unsloth, **later), shapes)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"r": NaN}', b"[" * 100_000, b" " * 2**21])
def test_a_config_that_is_none_is_refused(shapes: dict[str, ModuleShape], content: bytes) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_peft(content, files()[1], shapes)
    assert caught.value.param == "adapter_config"


TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "nothing": ({}, "holds no LoRA"),
    "DoRA": (pair() | {f"{Q}.lora_magnitude_vector.weight": torch.ones(256)}, "magnitude_vector.*DoRA"),
    "embedding": (pair() | {"base_model.model.model.embed.lora_embedding_A": torch.ones(4, 9)}, "embeddings"),
    "bias": (pair() | {f"{Q}.lora_B.bias": torch.ones(256)}, "cannot change a bias"),
    "whole": ({"base_model.model.lm_head.modules_to_save.weight": torch.ones(2)}, "whole modules"),
    "embeddings beside it": (
        pair() | {"base_model.model.model.embed_tokens.weight": torch.ones(2, 2)},
        "save_embedding_layers=False",
    ),
    "head beside it": (pair() | {"base_model.model.lm_head.weight": torch.ones(2)}, "output heads cannot"),
    "head with a LoRA": (
        {**pair("base_model.model.lm_head"), "base_model.model.lm_head.base_layer.weight": torch.ones(2)},
        "lm_head.*train without them in target_modules|lm_head, which is not a linear layer",
    ),
    "strange": ({"weights": torch.ones(2)}, "weights: only lora_A"),
    "head": (pair("base_model.model.lm_head", d_out=8192), "lm_head"),
    "unknown": (pair(Q.replace("layers.0", "layers.6")), "layers.6.self_attn.q_proj"),
    "conv": ({f"{Q}.lora_A.weight": torch.ones(4, 256, 1, 1), f"{Q}.lora_B.weight": torch.ones(256, 4)},
             r"\[4, 256, 1, 1\]"),
    "half": ({f"{Q}.lora_B.weight": torch.zeros(256, 4)}, "lora_B of .* without its lora_A"),
    "wide": (pair(d_in=255), r"lora_A of .* as \[4, 255\].*\[4, 256\]"),
    "long": (pair(d_out=300), r"lora_B of .* as \[300, 4\]"),
    "swapped": ({f"{Q}.lora_A.weight": torch.ones(256, 4), f"{Q}.lora_B.weight": torch.ones(4, 256)},
                "256, 4"),
    "rank": (pair(rank=3), r"\[3, 256\].*\[4, 256\]"),
    "integers": ({name: value.int() for name, value in pair().items()}, "I32, not as F32"),
    "double": ({name: value.double() for name, value in pair().items()}, "F64"),
    "infinite": ({name: value / 0 for name, value in pair().items()}, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_cannot_be_represented_are_named(shapes: dict[str, ModuleShape], case: str) -> None:
    tensors, words = TENSORS[case]
    with pytest.raises(InvalidInput) as caught:
        read_peft(*files(tensors), shapes)
    assert caught.value.param == "adapter_model"
    assert re.search(words, caught.value.message), caught.value.message


def test_a_rank_above_the_largest_is_refused(shapes: dict[str, ModuleShape]) -> None:
    wide = "base_model.model.model.layers.0.mlp.gate_proj"
    module = shapes[wide.removeprefix("base_model.model.")]
    side = min(module.d_in, module.d_out)
    limits = {ModuleShape("wide", 4096, 4096): LowRank(torch.zeros(600, 4096), torch.zeros(4096, 600))}
    with pytest.raises(InvalidInput, match="wide has rank 600; the largest rank is 512"):
        stored_rank(limits)
    lora = read_peft(*files(pair(wide, rank=1000, d_in=module.d_in, d_out=module.d_out), r=1000), shapes)
    assert lora.rank == side < 512


# Names that other programs write

NAMES = {
    "adapter's name": "base_model.model.{}.lora_{}.default.weight",
    "compiled": "base_model.model._orig_mod.{}.lora_{}.weight",
    "compiled outside": "_orig_mod.base_model.model.{}.lora_{}.my-adapter.weight",
    "no prefix": "{}.lora_{}.weight",
    "FSDP": "module.base_model.model.{}._fsdp_wrapped_module.lora_{}.default.weight",
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_a_state_dict_are_understood(shapes: dict[str, ModuleShape], case: str) -> None:
    module = Q.removeprefix("base_model.model.")
    plain = read_peft(*files(), shapes)
    renamed = {NAMES[case].format(module, side): pair()[f"{Q}.lora_{side}.weight"] for side in "AB"}
    lora = read_peft(*files(renamed), shapes)
    assert list(lora.changes) == list(plain.changes) == [shapes[module]]
    assert torch.equal(lora.changes[shapes[module]].A, plain.changes[shapes[module]].A)


def test_compiled_layers_and_a_model_without_its_own_prefix_are_understood(
    shapes: dict[str, ModuleShape],
) -> None:
    for name in ("base_model.model.model.layers.0._orig_mod.self_attn.q_proj", "layers.0.self_attn.q_proj"):
        changes = read_peft(*files(pair(name)), shapes).changes
        assert [shape.name for shape in changes] == ["model.layers.0.self_attn.q_proj"]


AMBIGUOUS_NAMES: dict[str, tuple[dict[str, Tensor], str]] = {
    "one of many": (pair("base_model.model.self_attn.q_proj"), "may mean model.layers.0.* or model.layers.1"),
    "two names of one": (pair() | pair(Q.removeprefix("base_model.model.")), "are both lora_A of"),
    "two adapters": (
        pair() | {k.replace(".weight", ".other.weight"): v for k, v in pair(K, d_out=128).items()},
        "factors of several adapters.*k_proj.*q_proj",
    ),
    "two adapters of one module": (
        pair() | {k.replace(".weight", ".other.weight"): v for k, v in pair().items()}, "both lora_A"
    ),
    "another case": (pair(Q.replace("q_proj", "Q_proj")), "Q_proj, which is not a linear layer"),
    "mlx-lm": (
        {"model.layers.0.self_attn.q_proj.lora_a": torch.ones(256, 4)},
        "as mlx-lm writes it; write lora_a and lora_b",
    ),
    "KaSA": (pair() | {f"{Q}.lora_diag": torch.ones(4)}, "KaSA's diagonal"),
}  # fmt: skip


@pytest.mark.parametrize("case", AMBIGUOUS_NAMES)
def test_names_that_may_mean_several_things_are_refused(shapes: dict[str, ModuleShape], case: str) -> None:
    tensors, words = AMBIGUOUS_NAMES[case]
    with pytest.raises(InvalidInput) as caught:
        read_peft(*files(tensors), shapes)
    assert caught.value.param == "adapter_model"
    assert re.search(words, caught.value.message), caught.value.message


def test_spoiled_tensor_files_are_refused(shapes: dict[str, ModuleShape]) -> None:
    config, model = files()
    header = b'{"x": {"shape": 3}}'
    spoiled = [
        b"", model[:7], model[:100], model[:-1], model + b"\0", b"PK\x03\x04" + model, b"\x80\x04" + model,
        struct.pack("<Q", 2**63) + model[8:], struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 19) + header,
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ]  # fmt: skip
    for content in spoiled:
        with pytest.raises(InvalidInput) as caught:
            read_peft(config, content, shapes)
        assert caught.value.param == "adapter_model"


@settings(max_examples=150)
@given(st.data())
def test_whatever_is_changed_in_the_files_is_an_adapter_or_an_error(
    shapes: dict[str, ModuleShape], data: st.DataObject
) -> None:
    contents = [bytearray(content) for content in files()]
    for content in contents:
        end = min(len(content), 400) - 1
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    try:
        lora = read_peft(bytes(contents[0]), bytes(contents[1]), shapes)
    except InvalidInput as error:
        error.message.encode("utf-8")
    else:
        assert lora.rank == 4
