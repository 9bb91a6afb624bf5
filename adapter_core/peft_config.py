"""What `adapter_config.json` says of a LoRA, as far as it decides what is computed; the rest is refused.

    y = W x + s_m B_m A_m x            s_m = α_m / r_m, or α_m / √r_m for rsLoRA

Only what PEFT would compute from the same files is accepted. Knows no tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from adapter_core.errors import InvalidInput

CONFIG_NAME = "adapter_config.json"
CODE = "invalid_peft_adapter"
#: The config of an 8B model with a rank of its own for each of 224 modules is 20 KB.
MAX_CONFIG_BYTES = 1024**2
MAX_ALPHA = 1e6
#: Initialisations that leave W alone. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, …) make PEFT take an
#: initial product off W when it loads the files, and what is taken off is not in them.
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
#: What has no say in what a trained LoRA computes. Which modules it changes is read from its tensors;
#: fan_in_fan_out says how W lies in memory, A and B lie the same way in any case.
PASSED_OVER = frozenset((
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules",
))  # fmt: skip
#: What cannot be represented by A, B and a scale, and why.
REFUSED = {
    "use_dora": "DoRA rescales the columns of W + BA",
    "lora_bias": "a bias of lora_B is no low-rank change",
    "modules_to_save": "whole modules would have to be replaced",
    "trainable_token_indices": "embeddings would have to be replaced",
    "layer_replication": "the base model would get other layers",
    "target_parameters": "only linear layers can carry adapters",
    "use_qalora": "QALoRA pools the inputs",
    "alora_invocation_tokens": "the change would begin in the middle of a prompt",
    "arrow_config": "Arrow routes between several adapters",
}

# A name with at most so many quantifiers, none of them on a group, cannot make `re` backtrack for long.
_SAFE_PATTERN = re.compile(r"[\w.^$|()\[\]\\*+?-]{1,300}")
_MAX_QUANTIFIERS = 2
_MAX_PATTERNS = 4096


@dataclass(frozen=True)
class PeftConfig:
    """rank, alpha: where no pattern says otherwise. base_model: what it was trained on, as its file says."""

    rank: int
    alpha: float
    is_rank_stabilised: bool = False
    rank_patterns: list[tuple[re.Pattern[str], int]] = field(default_factory=list)
    alpha_patterns: list[tuple[re.Pattern[str], float]] = field(default_factory=list)
    base_model: str | None = None

    def rank_of(self, module: str) -> int:
        return next((value for pattern, value in self.rank_patterns if pattern.match(module)), self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """s_m of a module whose factors have this rank."""
        alpha = next((value for pattern, value in self.alpha_patterns if pattern.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def parse_config(content: bytes) -> PeftConfig:
    """Raises `InvalidInput` naming the key and its value for whatever cannot be represented."""
    values = _parse_json(content)
    if values.get("peft_type") != "LORA":
        _refuse("peft_type", values.get("peft_type"), "only LORA can be imported")
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        _refuse("task_type", values["task_type"], "only adapters of causal language models can be imported")
    if values.get("bias", "none") != "none":
        _refuse("bias", values["bias"], "biases of the base model stay frozen")
    init = values.get("init_lora_weights", True)
    if not any(init is known or (isinstance(init, str) and init == known) for known in HARMLESS_INITS):
        _refuse(
            "init_lora_weights", init,
            "it changes the base model's weights on loading; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which gives a plain LoRA",
        )  # fmt: skip
    for key, reason in REFUSED.items():
        if values.get(key) not in (None, False, [], {}):
            _refuse(key, values[key], reason)
    known = {"peft_type", "task_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora",
             "rank_pattern", "alpha_pattern", *REFUSED, *PASSED_OVER}  # fmt: skip
    for key, value in values.items():
        if key not in known and value not in (None, False, [], {}, ""):
            _refuse(key, value, "this build does not know what it does")
    base_model = values.get("base_model_name_or_path")
    return PeftConfig(
        rank=_rank("r", values.get("r", 8)),
        alpha=_alpha("lora_alpha", values.get("lora_alpha", 8)),
        is_rank_stabilised=_boolean("use_rslora", values.get("use_rslora")),
        rank_patterns=[(p, _rank("rank_pattern", v)) for p, v in _patterns("rank_pattern", values)],
        alpha_patterns=[(p, _alpha("alpha_pattern", v)) for p, v in _patterns("alpha_pattern", values)],
        base_model=printable(base_model) if isinstance(base_model, str) else None,
    )


def _parse_json(content: bytes) -> dict[str, Any]:
    if len(content) > MAX_CONFIG_BYTES:
        _malformed(f"it holds {len(content)} bytes, more than {MAX_CONFIG_BYTES}")
    try:
        values = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _malformed(f"it is not JSON: {error}")
    if not isinstance(values, dict):
        _malformed("it is no JSON object")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _rank(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(key, value, "a rank is a whole number of at least 1")
    return value


def _alpha(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        _refuse(key, value, f"a number of at most {MAX_ALPHA:g} is needed")
    return float(value)


def _boolean(key: str, value: Any) -> bool:
    if value not in (None, True, False):
        _refuse(key, value, "true or false is needed")
    return bool(value)


def _patterns(key: str, values: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Any]]:
    """(pattern, value) in the file's order: as in PEFT, the first that matches the end of a name counts."""
    given = values.get(key) or {}
    if not isinstance(given, dict) or len(given) > _MAX_PATTERNS:
        _refuse(key, given, f"an object of at most {_MAX_PATTERNS} patterns is needed")
    return [(_compile(key, pattern), value) for pattern, value in given.items()]


def _compile(key: str, pattern: str) -> re.Pattern[str]:
    quantifiers = sum(map(pattern.count, "*+?"))
    is_safe = _SAFE_PATTERN.fullmatch(pattern) and quantifiers <= _MAX_QUANTIFIERS
    if not is_safe or re.search(r"\)[*+?]", pattern):
        _refuse(key, pattern, "only names and simple patterns can be matched")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        _refuse(key, pattern, f"it is no pattern: {error}")


def _refuse(key: str, value: Any, reason: str) -> NoReturn:
    key = printable(key)
    shown = json.dumps(value)[:100]
    raise InvalidInput(f"{CONFIG_NAME}: {key} is {shown}: {reason}", param=f"adapter_config.{key}", code=CODE)


def printable(text: str) -> str:
    """What a stranger wrote, short and in ASCII: a lone surrogate in an answer cannot be encoded."""
    return text[:200].encode("ascii", "backslashreplace").decode()


def _malformed(reason: str) -> NoReturn:
    raise InvalidInput(f"{CONFIG_NAME}: {reason}", param="adapter_config", code=CODE)
