"""Loading a base model, its digest, and finding and replacing its target modules."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tessera.chat.tokenizer import load_tokenizer
from tessera.defaults import BUNDLED_MODEL, LLAMA_LINEARS
from tessera.errors import InvalidInput, UnsupportedModel
from tessera.model.base_model import (
    BaseModel,
    iter_target_modules,
    linear_layers,
    load_base_model,
    replace_module,
    resolve_device,
    resolve_dtype,
)
from tessera.model.files import model_digest, model_folder, model_name, public_source
from tessera.model.quantised import check_loaded
from tessera.model.target_modules import choose_targets

ROOT = Path(__file__).parents[3]
WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def random_model(model_type: str, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """Copy the files of the bundled model into a folder that a test may damage."""
    return Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "copy"))


# Loading


def test_the_bundled_model_loads_frozen(tiny: BaseModel) -> None:
    assert (tiny.name, tiny.device.type) == (BUNDLED_MODEL.name, "cpu")
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    assert not tiny.model.training
    assert {parameter.dtype for parameter in tiny.model.parameters()} == {torch.float32}
    assert tiny.max_position == tiny.model.config.max_position_embeddings


def test_it_loads_in_the_dtype_that_is_asked_for() -> None:
    base = load_base_model(BUNDLED_MODEL, device="cpu", dtype="bfloat16")
    assert base.model.dtype == torch.bfloat16


def test_the_tokenizer_has_a_chat_template() -> None:
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    assert tokenizer.chat_template
    assert tokenizer.decode(tokenizer("hello")["input_ids"]).endswith("hello")


@pytest.mark.parametrize("load", [load_base_model, load_tokenizer])
def test_a_source_that_is_nowhere_is_refused_by_name(load: Any) -> None:
    with pytest.raises(UnsupportedModel, match="nobody/nothing") as refused:
        load("nobody/nothing")
    assert refused.value.param == "base_model"


def test_a_folder_without_safetensors_is_refused(model_copy: Path) -> None:
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel):
        load_base_model(model_copy)
    with pytest.raises(UnsupportedModel, match="pickled"):
        model_digest(model_copy)


def test_an_unreadable_config_is_refused(model_copy: Path) -> None:
    (model_copy / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(UnsupportedModel, match="cannot load the base model"):
        load_base_model(model_copy)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "layers that the files do not have": ({"num_hidden_layers": 9}, "not in its files, .*model.layers.[4-9]"),
    "biases that the files do not have": (
        {"attention_bias": True},
        "not in its files, .*_proj.bias",
    ),
    "a head that the files do not have": ({"tie_word_embeddings": False}, "incomplete.*: lm_head.weight$"),
    "another vocabulary": ({"vocab_size": 300}, "of its weights have other shapes.*embed_tokens"),
    "a rotation that nobody knows": (
        {"rope_parameters": {"rope_type": "nope"}},
        "transformers fails on it: .*nope",
    ),
    "no number": ({"hidden_size": "many"}, "hidden_size"),
    "a quantisation that is no object": ({"quantization_config": "gptq"}, "cannot load the base model"),
    "no language model": ({"model_type": "t5"}, "no causal language model of type t5$"),
    "an encoder beside it": ({"is_encoder_decoder": True}, "decoder of an encoder-decoder model"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_the_files_do_not_fit_is_refused_in_words(model_copy: Path, case: str) -> None:
    """transformers would fill in random weights, or raise an unrelated error."""
    fields, words = CONFIGS[case]
    config = json.loads((model_copy / "config.json").read_bytes())
    (model_copy / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UnsupportedModel, match=words) as refused:
        load_base_model(model_copy, device="cpu", dtype="float32")
    assert refused.value.param == "base_model"


def test_names_of_dtypes_and_devices() -> None:
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("auto", "cuda:1") == torch.bfloat16
    assert resolve_dtype("float16", "cpu") == torch.float16
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(InvalidInput, match="int4"):
        resolve_dtype("int4", "cpu")


def test_clients_call_a_model_by_the_last_part_of_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-model" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my-model")
    assert [model_name(here) for here in (".", "./", "below/..")] == ["my-model"] * 3
    assert model_name(tmp_path / "my-model") == "my-model"
    assert model_name("org/name") == "name"
    assert public_source(tmp_path / "my-model") == "my-model"
    assert public_source("org/name") == "org/name"
    assert model_folder(tmp_path / "my-model") == tmp_path / "my-model"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_weights_that_may_not_be_read_are_named() -> None:
    script = (
        "import os, sys\n"
        "from tessera.model.base_model import load_base_model\n"
        "os.setuid(65534)\n"
        "load_base_model(sys.argv[1], device='cpu')"
    )
    with tempfile.TemporaryDirectory() as folder:  # other users cannot enter the folders of pytest
        os.chmod(folder, 0o755)
        for file in BUNDLED_MODEL.iterdir():
            os.chmod(shutil.copy(file, folder), 0o600 if file.suffix == ".safetensors" else 0o644)
        command = [sys.executable, "-c", script, folder]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .endswith(f"{folder}: no permission to read model.safetensors (user id 65534)")
    )


# The digest


def test_the_digest_names_the_bytes_and_not_the_place(model_copy: Path, tiny: BaseModel) -> None:
    assert model_digest(model_copy) == tiny.model_id
    (model_copy / "README.md").write_text("other words")
    assert model_digest(model_copy) == tiny.model_id


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_the_digest_changes_with_one_byte(model_copy: Path, tiny: BaseModel, name: str) -> None:
    content = bytearray((model_copy / name).read_bytes())
    content[-1] ^= 1
    (model_copy / name).write_bytes(content)
    assert model_digest(model_copy) != tiny.model_id


def test_files_of_the_hubs_cache_are_named_without_reading_them(model_copy: Path, tiny: BaseModel) -> None:
    weights = model_copy / "model.safetensors"
    blob = model_copy / hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.rename(blob)
    weights.symlink_to(blob)
    assert model_digest(model_copy) == tiny.model_id
    blob.write_bytes(b"")  # its name is used, not its content
    assert model_digest(model_copy) == tiny.model_id


# Target modules


def test_llama_gives_all_seven_linears_of_every_layer_in_model_order(tiny: BaseModel) -> None:
    found = list(iter_target_modules(tiny.model))
    assert len(found) == 7 * tiny.model.config.num_hidden_layers
    assert [name.split(".")[-1] for name, _ in found[:7]] == list(LLAMA_LINEARS)
    for name, module in found:
        assert tiny.model.get_submodule(name) is module


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_llama_like_models_need_no_pattern(model_type: str) -> None:
    assert len(list(iter_target_modules(random_model(model_type, **WIDTHS)))) == 14


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["q_proj"], 2),
        (["[qk]_proj"], 4),
        (["*.mlp.*"], 6),
        (["model.layers.1.*_proj"], 7),
        (["all-linear"], 14),
        (["q_proj", "all-linear", "*.q_proj"], 14),
    ],
)
def test_patterns(patterns: list[str], count: int) -> None:
    names = [name for name, _ in iter_target_modules(random_model("llama", **WIDTHS), patterns)]
    assert len(names) == len(set(names)) == count
    assert not any("lm_head" in name for name in names)


def test_models_with_other_names_are_found_by_theirs() -> None:
    phi3 = random_model("phi3", **WIDTHS)
    assert len(list(iter_target_modules(phi3, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]))) == 8


def test_a_pattern_without_a_match_lists_what_there_is(tiny: BaseModel) -> None:
    with pytest.raises(UnsupportedModel, match=r"query_key_value.*down_proj.*q_proj") as refused:
        list(iter_target_modules(tiny.model, ["query_key_value"]))
    assert refused.value.param == "target_modules"


def test_a_layer_that_is_no_linear_is_refused_by_name() -> None:
    gpt2 = random_model("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    with pytest.raises(UnsupportedModel, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        list(iter_target_modules(gpt2, ["c_attn"]))
    with pytest.raises(UnsupportedModel, match=r"model\.embed_tokens is a Embedding"):
        list(iter_target_modules(random_model("llama", **WIDTHS), ["embed_tokens"]))


def test_a_quantised_layer_is_refused_by_name() -> None:
    model = random_model("llama", **WIDTHS)
    quantised = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    model.get_submodule("model.layers.1.self_attn.q_proj").weight = quantised
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.self_attn\.q_proj .*int8"):
        list(iter_target_modules(model, ["q_proj"]))


QUANTISED: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "hqq": {"quant_method": "hqq"},
    "torchao": {"quant_method": "torchao", "quant_type": "int8_weight_only"},
    "unheard-of": {"quant_method": "unheard-of"},  # transformers would load it as if it were not quantised
    "without a name": {"bits": 4},
}


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("where", ["quantization_config", "compression_config", "text_config"])
def test_a_quantised_model_is_refused_in_one_sentence(model_copy: Path, method: str, where: str) -> None:
    config = json.loads((model_copy / "config.json").read_bytes())
    given = QUANTISED[method]
    config[where] = {"quantization_config": given} if where == "text_config" else given
    (model_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel) as refused:
        load_base_model(model_copy, device="cpu", dtype="float32")
    assert refused.value.param == "base_model"
    assert re.search(f"are quantised .*{method}.*Use the model that it was made from", refused.value.message)
    assert "\n" not in refused.value.message


@pytest.fixture
def float8_copy(model_copy: Path) -> Path:
    """A folder whose config says float8. The weights are plain: what transformers makes of such ones here."""
    config = json.loads((model_copy / "config.json").read_bytes())
    config["quantization_config"] = {"quant_method": "fp8"}
    (model_copy / "config.json").write_text(json.dumps(config))
    return model_copy


def test_weights_that_were_dequantised_at_load_are_served(float8_copy: Path, tiny: BaseModel) -> None:
    loaded = load_base_model(float8_copy, device="cpu", dtype="float32")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    prompt = torch.tensor([[1, 17, 250]])
    found, expected = loaded.model(prompt).logits, tiny.model(prompt).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0.3)  # because of the rounding through bfloat16


def test_weights_that_stay_quantised_after_the_load_are_refused(float8_copy: Path) -> None:
    model = nn.Linear(2, 2)
    model.is_quantized = True  # as transformers sets it
    with pytest.raises(UnsupportedModel, match="quantised"):
        check_loaded("tiny", float8_copy, model)


def test_replace_module_puts_the_new_one_in_the_place_of_the_old(tiny: BaseModel) -> None:
    model = copy.deepcopy(tiny.model)
    old = model.get_submodule("model.layers.0.mlp.up_proj")
    seen: list[nn.Linear] = []

    def make(linear: nn.Linear) -> nn.Module:
        seen.append(linear)
        return nn.Sequential(linear)

    new = replace_module(model, "model.layers.0.mlp.up_proj", make)
    assert seen == [old]
    assert model.get_submodule("model.layers.0.mlp.up_proj") is new
    token_ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids).logits, tiny.model(token_ids).logits)


@pytest.mark.parametrize("patterns", [["*"], ["model.layers.0.*"]])
def test_wildcards_choose_among_linear_layers(patterns: list[str]) -> None:
    model = random_model("llama", **WIDTHS)
    names = [name for name, _ in iter_target_modules(model, patterns)]
    assert names == choose_targets(list(linear_layers(model)), patterns)
    assert names
