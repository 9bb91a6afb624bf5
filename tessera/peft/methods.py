"""The methods of PEFT by `peft_type`: which files can be imported, and what works for all others.

Checked against PEFT 0.21.2: `tests/tessera/peft/test_peft_methods.py` makes an adapter of every type, tries
what is said here, and fails for a type that PEFT has and this table lacks. This module knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Way(Enum):
    """How an adapter of a method gets here."""

    IMPORTED = "imported as it is"
    CONVERTED = "`peft.save_as_lora`, then import the LoRA"
    MERGED = "`merge_and_unload`, then serve another base model"
    RETRAINED = "train a LoRA instead"


_IMPORTED = ("LORA", "TINYLORA")
#: `peft.save_as_lora` turns these into a LoRA, exactly if the rank is large enough. (For DoRA, aLoRA and
#: lora_bias, which are of the type LORA, it writes only B A and drops the rest without an error.)
_CONVERTED = (
    "C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA", "UNILORA", "VBLORA",
    "VERA", "WAVEFT",
)  # fmt: skip
#: PEFT can only merge these.
_MERGED = (
    "ADALORA", "ADAMSS", "BOFT", "DEFT", "FROD", "GLORA", "HIRA", "HRA", "IA3", "LN_TUNING", "OFT", "OSF",
    "PEANUT", "PVERA", "ROAD", "SHIRA", "SUPERTUNING", "TRAINABLE_TOKENS",
)  # fmt: skip
#: These change the input or depend on it. PEFT cannot merge LILY, and BEFT only where the base has biases.
_RETRAINED = (
    "ADAPTION_PROMPT", "BEFT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA",
)  # fmt: skip
WAYS: Mapping[str, Way] = {
    **dict.fromkeys(_IMPORTED, Way.IMPORTED),
    **dict.fromkeys(_CONVERTED, Way.CONVERTED),
    **dict.fromkeys(_MERGED, Way.MERGED),
    **dict.fromkeys(_RETRAINED, Way.RETRAINED),
}
#: The release of PEFT that has `save_as_lora`, and of the methods for which it came later.
_CONVERTING_SINCE = "0.19.0"
_CONVERTED_SINCE = {"UNILORA": "0.20.0"}
#: What else an owner has to know, by method.
_NOTES = {
    "PSOFT": (
        "; do that with the base model in the dtype of the training, because the file lacks the factors and "
        "PEFT takes them from a decomposition of the base model's weights"
    ),
}

MERGE = "merge it with PEFT's merge_and_unload and serve the result as another base model"


def convert_advice(method: str = "") -> str:
    """Return how to turn an adapter of a method into a LoRA."""
    since = _CONVERTED_SINCE.get(method, _CONVERTING_SINCE)
    return (
        f"load it in PEFT ({since} or later), write it with peft.save_as_lora(folder, model, rank=1.0), "
        "which keeps all that was learned (a whole number keeps so many directions), and import that folder"
        f"{_NOTES.get(method, '')}"
    )


def refusal_of(peft_type: str) -> str:
    """Return why an adapter of this type cannot be imported as it is, and what works. "": no type."""
    reason = f"only {' and '.join(_IMPORTED)} can be imported"
    way = WAYS.get(peft_type)
    if way is Way.CONVERTED:
        return f"{reason}; {convert_advice(peft_type)}"
    if way is Way.MERGED:
        return f"{reason}, and PEFT cannot turn this method into a LoRA; {MERGE}"
    if way is Way.RETRAINED:
        return f"{reason}, and PEFT can turn it neither into a LoRA nor into weights; train a LORA instead"
    if peft_type:
        return (
            f"{reason}, and this method is unknown here; if PEFT knows it, try "
            "peft.save_as_lora(folder, model, rank=1.0), or else train a LORA instead"
        )
    return reason
