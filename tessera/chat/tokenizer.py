"""The tokenizer of a base model, where possible without loading torch.

transformers chooses the class of a tokenizer by tables that stand beside its models, and reading those loads
torch: 300 MB and seconds for a process that only turns text into tokens. The classes themselves do not need
it. So the choice is written down here for the model types that are served most; any other is left to
`AutoTokenizer`, at that price. `tests/tessera/chat/test_tokenizer.py` compares the table with it.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from tessera.errors import UnsupportedModel
from tessera.model.files import model_folder

_GENERIC = "tokenization_utils_tokenizers.TokenizersBackend"
_GPT2 = "models.gpt2.tokenization_gpt2.GPT2Tokenizer"
_QWEN2 = "models.qwen2.tokenization_qwen2.Qwen2Tokenizer"
_GEMMA = "models.gemma.tokenization_gemma.GemmaTokenizer"
#: (`model_type` of config.json, `tokenizer_class` of tokenizer_config.json) → the class, within transformers.
CLASSES = {
    ("llama", "PreTrainedTokenizerFast"): _GENERIC,
    ("llama", "PreTrainedTokenizer"): _GENERIC,
    ("llama", "TokenizersBackend"): _GENERIC,
    ("llama", "GPT2Tokenizer"): _GPT2,
    ("llama", "GPT2TokenizerFast"): _GPT2,
    ("qwen2", "Qwen2Tokenizer"): _QWEN2,
    ("qwen3", "Qwen2Tokenizer"): _QWEN2,
    ("qwen3_moe", "Qwen2Tokenizer"): _QWEN2,
    ("gemma2", "GemmaTokenizer"): _GEMMA,
    ("gemma2", "GemmaTokenizerFast"): _GEMMA,
    ("gemma3_text", "GemmaTokenizer"): _GEMMA,
    ("gemma3_text", "GemmaTokenizerFast"): _GEMMA,
    ("gpt2", "GPT2Tokenizer"): _GPT2,
    ("smollm3", "PreTrainedTokenizerFast"): _GENERIC,
}


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer (with its chat template) of a base model. Raises `UnsupportedModel`."""
    folder = model_folder(source, revision=revision)
    try:
        return _class_for(folder).from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"cannot load the tokenizer of {source}: {error}", param="base_model"
        ) from error


def _class_for(folder: Path) -> Any:
    """Return the class whose `from_pretrained` fits: the tokenizer's, or `AutoTokenizer`, which finds it."""
    config, tokenizer_config = (_read(folder / name) for name in ("config.json", "tokenizer_config.json"))
    path = CLASSES.get((str(config.get("model_type")), str(tokenizer_config.get("tokenizer_class"))))
    if path is None or "auto_map" in tokenizer_config:
        from transformers import AutoTokenizer

        return AutoTokenizer
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"transformers.{module}"), name)


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if the file has none. Transformers reports the error in that case."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
