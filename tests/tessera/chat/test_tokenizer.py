"""Which class a tokenizer gets: the one that transformers would choose, without loading torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tessera.chat.tokenizer import CLASSES, load_tokenizer
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import UnsupportedModel

TEXT = "The nose, Straße,  two spaces\n<|user|>東京 🙂"


def make_folder(folder: Path, model_type: str, tokenizer_class: str | None) -> Path:
    """The bundled model's tokenizer under the names of another one."""
    content = (BUNDLED_MODEL / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = json.loads((BUNDLED_MODEL / "tokenizer_config.json").read_bytes())
    config |= {"tokenizer_class": tokenizer_class, "unk_token": config["pad_token"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("model_type", "tokenizer_class"), CLASSES)
def test_the_table_says_what_transformers_chooses(
    model_type: str, tokenizer_class: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, model_type, tokenizer_class)
    ours = load_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "NobodysTokenizer", None])
def test_what_is_not_in_the_table_is_left_to_transformers(
    tokenizer_class: str | None, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, "llama", tokenizer_class)
    assert type(load_tokenizer(folder)) is type(AutoTokenizer.from_pretrained(folder))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedModel, match="cannot load the tokenizer of"):
        load_tokenizer(tmp_path)


def test_the_bundled_models_tokenizer_and_template_need_no_torch() -> None:
    program = (
        "import sys\n"
        "from tessera.chat.chat_format import load_chat_format\n"
        "from tessera.defaults import BUNDLED_MODEL\n"
        "chat = load_chat_format(BUNDLED_MODEL)\n"
        "print(len(chat.prompt_ids([{'role': 'user', 'content': 'Hello'}])), 'torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    num_tokens, has_torch = result.stdout.split()
    assert (int(num_tokens) > 2, has_torch) == (True, "False")
