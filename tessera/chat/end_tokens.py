"""The tokens that end a text, according to the files of a model.

`chat_format.py` adds those of its template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def named_end_tokens(folder: Path) -> tuple[int, ...]:
    """Return the end tokens in generation_config.json, or those in config.json if the former has none.

    transformers does the same: a model without generation_config.json takes the values of its config.json.
    """
    for name in ("generation_config.json", "config.json"):
        if named := _end_tokens(_read(folder / name)):
            return named
    return ()


def _end_tokens(config: dict[str, Any]) -> tuple[int, ...]:
    named = config.get("eos_token_id")
    if named is None and isinstance(config.get("text_config"), dict):
        named = config["text_config"].get("eos_token_id")
    values = named if isinstance(named, list) else [named]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    return config if isinstance(config, dict) else {}
