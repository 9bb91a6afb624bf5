"""Base models by name: fetched by pip from a folder, verified, converted, whole or absent."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import stat
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.base_models import ORIGIN_FILE, PACKAGED, PackagedModel, fetch, main, resolve
from tessera.chat.tokenizer import load_tokenizer
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import InvalidInput, Unavailable, UnsupportedModel
from tessera.model.base_model import load_base_model
from tessera.model.files import model_name
from tessera.processes.child_process import start_child
from tests.examples.tiny_gguf import SPECIAL, tiny_llama, write_package
from tests.waiting import wait_until_sync

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip can take for an index; its name has a space in it."""
    return tmp_path_factory.mktemp("with wheels")


@pytest.fixture(scope="module")
def package(packages: Path) -> PackagedModel:
    return write_package(packages, tiny_llama())


@pytest.fixture(scope="module")
def pip_args(packages: Path) -> str:
    return f"--no-index --find-links '{packages}'"


@pytest.fixture(scope="module")
def converted(package: PackagedModel, pip_args: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch(package, tmp_path_factory.mktemp("cache") / "little", pip_args=pip_args)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells a file from one that was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_the_fetched_model_computes_what_the_original_does(converted: Path) -> None:
    original, ids = tiny_llama(), torch.tensor([[1, 40, 41, 259, 7, 2, 100]])

    loaded = load_base_model(converted, device="cpu", dtype="float32").model

    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    stored = AutoModelForCausalLM.from_pretrained(converted, dtype="auto")
    assert stored.dtype == torch.bfloat16
    assert not hasattr(stored.config, "quantization_config")


def test_the_tokenizer_takes_digits_one_by_one_and_knows_its_special_tokens(converted: Path) -> None:
    tokenizer = load_tokenizer(converted)

    assert tokenizer.tokenize("a\n\n1  2") == ["a", "ĊĊ", "1", "ĠĠ", "2"]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.model_max_length == 64
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "é 12"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\né 12<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(chat)["input_ids"]) == chat


def test_a_converted_directory_says_where_it_is_from_and_everyone_may_read_it(
    converted: Path, package: PackagedModel
) -> None:
    assert json.loads((converted / ORIGIN_FILE).read_text())["package_sha256"] == package.sha256
    assert (converted / "LICENSE").read_text() == "do what you like\n"
    assert {stat.S_IMODE(path.stat().st_mode) for path in converted.iterdir()} == {0o644}
    assert [path.name for path in converted.parent.iterdir() if path.suffix != ".lock"] == ["little"]


def test_a_model_that_is_there_is_not_fetched_again(converted: Path, package: PackagedModel) -> None:
    before = contents(converted)

    assert fetch(package, converted, pip_args="--no-such-option") == converted

    assert contents(converted) == before


@pytest.mark.parametrize("damage", ["another origin", "no origin", "not JSON"])
def test_a_directory_of_another_origin_is_replaced(
    damage: str, package: PackagedModel, pip_args: str, tmp_path: Path
) -> None:
    folder = tmp_path / "little"
    folder.mkdir()
    (folder / "left.txt").touch()
    if damage != "no origin":
        text = "{" if damage == "not JSON" else json.dumps({**package.origin, "format": 0})
        (folder / ORIGIN_FILE).write_text(text)

    fetch(package, folder, pip_args=pip_args)

    assert not (folder / "left.txt").exists()
    assert json.loads((folder / ORIGIN_FILE).read_text()) == package.origin


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"sha256": "0" * 64}, None, "instead of 0000"),
        ({"requirement": "tiny-gguf==2.0"}, None, "pip could not download tiny-gguf==2.0"),
        ({}, "--no-index", "PIP_ARGS is handed to pip"),
        ({}, "--no-such-option", "pip could not download"),
    ],
)
def test_a_failed_download_leaves_nothing_and_keeps_what_was_there(
    change: dict[str, str],
    arguments: str | None,
    message: str,
    package: PackagedModel,
    pip_args: str,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "little"
    folder.mkdir()
    (folder / "older.txt").touch()

    with pytest.raises(Unavailable, match=message):
        fetch(dataclasses.replace(package, **change), folder, pip_args=arguments or pip_args)

    assert [path.name for path in folder.iterdir()] == ["older.txt"]
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["little"]


@pytest.mark.timeout(600)
def test_a_killed_conversion_leaves_no_model_and_the_next_one_tidies_up(
    package: PackagedModel, pip_args: str, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "little"
    command = [sys.executable, "-m", "tests.examples.fetching", str(tmp_path / "wheels"), str(folder)]
    process = start_child(command, environment={**os.environ, "PYTHONPATH": str(ROOT)})

    def has_begun() -> bool:
        assert process.poll() is None, "it ended before it could be killed"
        return bool(list(folder.parent.glob(".little.new-*/model")))

    try:
        wait_until_sync(has_begun)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    if folder.exists():  # it was quicker than we: then it is whole
        assert (folder / ORIGIN_FILE).is_file()
    else:
        assert list(folder.parent.glob(".little.new-*"))
        fetch(package, folder, pip_args=pip_args)
    assert load_base_model(folder, device="cpu").name == "little"
    assert not list(folder.parent.glob(".little.new-*"))


@pytest.mark.parametrize(
    "name", ["smolm2", "", "tiny ", "./nowhere", "/no/where", "~/no/where", "a/b/c", "../x"]
)
def test_an_unknown_name_is_told_what_there_is(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"Known by name: tiny, smollm2\. .*directory.*hub id") as caught:
        resolve(name, tmp_path)

    assert repr(name) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_directory_and_a_hub_id_are_taken_as_they_are(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(converted.parent)

    assert resolve("tiny", tmp_path) == str(BUNDLED_MODEL)
    assert resolve("./little", tmp_path) == resolve("little", tmp_path) == str(converted)
    assert model_name(resolve("little", tmp_path)) == "little"
    assert resolve("HuggingFaceTB/SmolLM2-135M", tmp_path) == "HuggingFaceTB/SmolLM2-135M"


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()

    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(UnsupportedModel, match=r"no directory with a config\.json"):
            resolve(str(path), tmp_path)


def test_the_command_prints_the_directory_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TESSERA_DATA_DIR", str(tmp_path))

    assert main(["tiny"]) == 0
    assert capsys.readouterr() == (f"{BUNDLED_MODEL}\n", "")
    assert main(["smolm2"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: there is no base model 'smolm2'")


def test_smollm2_is_the_model_that_it_is_said_to_be(smollm2: Path) -> None:
    """Needs SMOLLM2 (see `smollm2`): a converted copy, which must be one of this version."""
    assert json.loads((smollm2 / ORIGIN_FILE).read_text()) == PACKAGED["smollm2"].origin
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.tokenize("tea:\n\n1. Boil 23") == [
        "te",
        "a",
        ":",
        "ĊĊ",
        "1",
        ".",
        "ĠBo",
        "il",
        "Ġ",
        "2",
        "3",
    ]
    base = load_base_model(smollm2, device="cpu", dtype="float32")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = base.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "The capital of France is Paris" in tokenizer.decode(answer)
