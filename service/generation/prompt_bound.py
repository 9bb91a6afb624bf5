"""The most characters that one token can cover: a longer text cannot fit and need not be tokenised.

Knows nothing but the tokenizer's description.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

#: Unicode's canonical composition makes one character out of at most four.
_MAX_COMPOSED = 4
#: How many characters each normalizer may turn into one.
_NORMALIZERS = {
    "NFC": _MAX_COMPOSED,
    "NFKC": _MAX_COMPOSED,
    "NFD": 1,
    "NFKD": 1,
    "Prepend": 1,
    "Lowercase": 1,
}
#: Pre-tokenizers that cut a text without dropping a part of it (`Split` and `Punctuation` have an option that
#: drops).
_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Split", "Punctuation"}


@dataclass(frozen=True)
class PromptBound:
    """The most characters that one token of a tokenizer can cover."""

    #: The bound in a text that is all ASCII.
    ascii_chars: int
    #: The bound in any other text, where normalizing may shorten it first.
    other_chars: int


def prompt_bound(backend: Backend) -> PromptBound | None:
    """Return the bound of a tokenizer; None if there is none.

    There is none if the tokenizer drops characters, if one unknown token covers any run of unknown
    characters, or if a token swallows the white space beside it.
    """
    description = json.loads(backend.to_str())
    model = description["model"]
    has_unknown = model.get("unk_token") is not None or model.get("unk_id") is not None
    is_lossless = model["type"] in ("BPE", "Unigram") and (model.get("byte_fallback") or not has_unknown)
    if not is_lossless or any(token["lstrip"] or token["rstrip"] for token in description["added_tokens"]):
        return None
    if not all(_keeps_all(step) for step in _steps(description["pre_tokenizer"], "pretokenizers")):
        return None
    shrinkage = 1
    for step in _steps(description["normalizer"], "normalizers"):
        factor = _shrinkage(step)
        if factor is None:
            return None
        shrinkage *= factor
    longest = max(map(len, backend.get_vocab(with_added_tokens=True)))
    return PromptBound(longest, shrinkage * longest)


def _steps(part: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for member in part[members] for step in _steps(member, members)]
    return [part]


def _keeps_all(step: dict[str, Any]) -> bool:
    return step["type"] in _PRE_TOKENIZERS and step.get("behavior") != "Removed"


def _shrinkage(step: dict[str, Any]) -> int | None:
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return 1 if pattern is not None and len(step["content"]) >= len(pattern) else None
    return _NORMALIZERS.get(step["type"])
