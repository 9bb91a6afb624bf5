"""Reading `adapter_config.json` of a LoRA: the keys that decide what is computed. What cannot be kept is
refused.

    y = W x + s_m B_m A_m x            s_m = α_m / r_m, or α_m / √r_m for rsLoRA

A config is accepted only if the import computes what PEFT would compute from the same files (checked against
PEFT 0.21.2). This module knows no tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import re2

from tessera.errors import InvalidInput
from tessera.peft.methods import MERGE, refusal_of

CONFIG_NAME = "adapter_config.json"
MODEL_NAME = "adapter_model.safetensors"
CODE = "invalid_peft_adapter"
#: How to turn an adapter of mlx-lm into one of PEFT.
MLX_ADVICE = (
    f"write lora_a and lora_b of each layer, both transposed, into {MODEL_NAME} as "
    f"base_model.model.<layer>.lora_A.weight and …lora_B.weight, and a {CONFIG_NAME} with peft_type LORA, "
    "the rank as r and scale × rank as lora_alpha"
)
#: The config of an 8B model with a separate rank for each of 224 modules has 20 KB.
MAX_CONFIG_BYTES = 1024**2
MAX_ALPHA = 1e6

#: Initialisations that do not change W, so that the files hold everything that was trained. The value is the
#: spelling that PEFT accepts (None: any upper and lower case).
_PLAIN_INITS = {"eva": "eva", "orthogonal": "orthogonal", "gaussian": None, "mica": None}
_SUBTRACTS = "PEFT takes an initial product off the base model's weights when it loads the files"
#: Initialisations that change W, by the beginning of their name, and why the files are not enough.
_BASE_CHANGING_INITS = {
    "pissa": _SUBTRACTS,
    "olora": _SUBTRACTS,
    "corda": _SUBTRACTS,
    "loftq": "PEFT quantises the base model's weights again when it loads the files",
    "lora_ga": "what LoRA-GA took off the base model's weights before the training is not in the files",
}
_CONVERT_INIT = (
    "save it with path_initial_model_for_weight_conversion (an argument of PEFT's save_pretrained), which "
    "gives a plain LoRA"
)

#: Keys without effect on what a trained LoRA computes. The changed modules are read from the tensors, and
#: fan_in_fan_out describes the layout of W in memory, not that of A and B. The last lines are keys of other
#: programs.
_IGNORED = frozenset((
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "monteclora_config",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "velora_config",
    "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "merge_weights", "transformers_version",
    "unsloth_version",
))  # fmt: skip
#: Keys that ask for more than A, B and a scale can represent, and why.
_REFUSED = {
    "use_dora": f"DoRA rescales the columns of W + BA; {MERGE}",
    "lora_bias": "a bias of lora_B is no low-rank change; train without it",
    "modules_to_save": f"whole modules would have to be replaced; train without it, or {MERGE}",
    "trainable_token_indices": f"embeddings would have to be replaced; train without it, or {MERGE}",
    "layer_replication": "the base model would get other layers",
    "target_parameters": "only linear layers can carry adapters, not parameters such as fused experts",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": f"BD-LoRA's factors are the blocks of block-diagonal matrices; {MERGE}",
    "kasa_config": f"KaSA truncates the base model's weights; {MERGE}",
    "alora_invocation_tokens": "aLoRA's change begins in the middle of a prompt, at the invocation tokens",
    "arrow_config": "Arrow routes between several adapters",
}
_PARSED = frozenset((
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "task_type",
    "use_rslora",
))  # fmt: skip
ABSENT: tuple[Any, ...] = (None, False, [], {}, "")

#: Most patterns of one key.
_MAX_PATTERNS = 4096
_MAX_PATTERN_CHARACTERS = 2000
#: Memory that RE2 may use for a pattern. Without this limit, matching a name could take milliseconds.
_MAX_PATTERN_BYTES = 64 * 1024
#: Limit on the instructions of all patterns of a key, times the number of modules. A separate pattern for
#: each of the 882 modules of a 405B model makes 47 million and takes 2.5 s, in a thread.
_MAX_EFFORT = 60_000_000
#: Syntax that RE2 and Python's `re` (which PEFT uses) both accept but interpret differently, or may in
#: future.
_AMBIGUOUS = ("{,", "[:", "[[", "--", "&&", "~~", "||")


@dataclass(frozen=True)
class PeftConfig:
    """The part of `adapter_config.json` that decides what is computed."""

    rank: int  # where no pattern matches
    alpha: float  # where no pattern matches
    is_rank_stabilised: bool = False
    #: (pattern compiled by re2, value) in the order of the file. As in PEFT, the first one that matches the
    #: end of a module's name counts.
    rank_patterns: list[tuple[Any, int]] = field(default_factory=list)
    alpha_patterns: list[tuple[Any, float]] = field(default_factory=list)
    #: The base model that the LoRA was trained on, according to the file.
    base_model: str | None = None

    def rank_of(self, module: str) -> int:
        return next((value for pattern, value in self.rank_patterns if pattern.match(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """Return the scale s_m of a module."""
        rank = self.rank_of(module)
        alpha = next((value for pattern, value in self.alpha_patterns if pattern.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)

    def check_effort(self, num_modules: int) -> None:
        """Raise `InvalidInput` if matching the patterns with so many modules would take too long."""
        for key, patterns in (("rank_pattern", self.rank_patterns), ("alpha_pattern", self.alpha_patterns)):
            effort = num_modules * sum(pattern.programsize for pattern, _ in patterns)
            if effort > _MAX_EFFORT:
                malformed(
                    f"{key} holds {len(patterns)} patterns, too many to match with {num_modules} modules; "
                    "name kinds of modules instead of each one"
                )


def parse_config(content: bytes) -> PeftConfig:
    """Parse the config. Raises `InvalidInput`, with the key and its value, for what cannot be represented."""
    values = read_config(content)
    _check_type(values)
    check_common(values)
    _check_init(values.get("init_lora_weights", True))
    for key, reason in _REFUSED.items():
        if values.get(key) not in ABSENT:
            refuse(key, values[key], reason)
    for key, value in values.items():
        if key not in _PARSED | _IGNORED | _REFUSED.keys() and value not in ABSENT:
            refuse(key, value, "this key is unknown here; remove it if it has no effect")
    return PeftConfig(
        rank=whole_number("r", values.get("r", 8)),
        alpha=_alpha("lora_alpha", values.get("lora_alpha", 8)),
        is_rank_stabilised=boolean("use_rslora", values.get("use_rslora")),
        rank_patterns=[(p, whole_number("rank_pattern", v)) for p, v in _patterns("rank_pattern", values)],
        alpha_patterns=[(p, _alpha("alpha_pattern", v)) for p, v in _patterns("alpha_pattern", values)],
        base_model=base_model_of(values),
    )


def check_common(values: Mapping[str, Any]) -> None:
    """Check the keys that all methods have. Raises `InvalidInput`."""
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        refuse("task_type", values["task_type"], "only adapters of causal language models can be imported")
    if values.get("bias", "none") != "none":
        refuse("bias", values["bias"], f"biases of the base model stay frozen; {MERGE}")


def base_model_of(values: Mapping[str, Any]) -> str | None:
    """Return the base model that the adapter was trained on, according to the file."""
    base_model = values.get("base_model_name_or_path")
    return printable(base_model) if isinstance(base_model, str) else None


def peft_type_of(values: Mapping[str, Any]) -> str:
    """Return the method in capital letters; "" if there is none."""
    peft_type = values.get("peft_type")
    return peft_type.upper() if isinstance(peft_type, str) else ""


def _check_type(values: Mapping[str, Any]) -> None:
    peft_type, name = values.get("peft_type"), peft_type_of(values)
    if name == "LORA":
        return
    if peft_type is None and ("lora_parameters" in values or "fine_tune_type" in values):
        malformed(f"this is the config of an mlx-lm adapter, not of PEFT; {MLX_ADVICE}")
    refuse("peft_type", peft_type, refusal_of(name))


def _check_init(init: Any) -> None:
    """Check that the files hold everything that was trained."""
    if init is None or isinstance(init, bool):
        return
    if isinstance(init, str):
        name = init.lower()
        if name in _PLAIN_INITS and _PLAIN_INITS[name] in (None, init):
            return
        for start, reason in _BASE_CHANGING_INITS.items():
            if name.startswith(start):
                refuse("init_lora_weights", init, f"{reason}; {_CONVERT_INIT}")
    known = ", ".join(["true", "false", *_PLAIN_INITS])
    refuse(
        "init_lora_weights", init, f"PEFT does not know this initialisation; these can be imported: {known}"
    )


def read_config(content: bytes) -> dict[str, Any]:
    """Read the JSON object of the file. Raises `InvalidInput`."""
    if len(content) > MAX_CONFIG_BYTES:
        malformed(f"it has {len(content)} bytes; the limit is {MAX_CONFIG_BYTES}")
    try:
        values = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        malformed(f"it is not JSON: {error}")
    if not isinstance(values, dict):
        malformed("it is not a JSON object")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def whole_number(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        refuse(key, value, "it must be a whole number of at least 1")
    return value


def _alpha(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        refuse(key, value, f"it must be a number of at most {MAX_ALPHA:g}")
    return float(value)


def boolean(key: str, value: Any) -> bool:
    if value not in (None, True, False):
        refuse(key, value, "it must be true or false")
    return bool(value)


def _patterns(key: str, values: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    given = values.get(key) or {}
    if not isinstance(given, dict) or len(given) > _MAX_PATTERNS:
        refuse(key, given, f"it must be an object with at most {_MAX_PATTERNS} patterns")
    return [
        (compile_pattern(key, pattern, rf"(.*\.)?({pattern})$"), value) for pattern, value in given.items()
    ]


def compile_pattern(key: str, pattern: str, whole: str) -> Any:
    """Compile `whole`, which is `pattern` as PEFT matches it, in a form that takes linear time."""
    if len(pattern) > _MAX_PATTERN_CHARACTERS:
        refuse(key, pattern, f"a pattern may have at most {_MAX_PATTERN_CHARACTERS} characters")
    for part in _AMBIGUOUS:
        if part in pattern:
            refuse(
                key,
                pattern,
                f"{part!r} has different meanings in different libraries; write the pattern without it",
            )
    options = re2.Options()
    options.log_errors, options.max_mem = False, _MAX_PATTERN_BYTES
    try:
        re.compile(whole)
    except (re.error, RecursionError, OverflowError) as error:
        refuse(key, pattern, f"it is not a regular expression: {error}")
    try:
        return re2.compile(whole, options)
    except (re2.error, UnicodeEncodeError) as error:
        detail = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        refuse(
            key, pattern,
            f"it cannot be matched in linear time ({printable(detail)}): look-around, back-references and "
            "repetitions above 1,000 are not supported; name the modules instead",
        )  # fmt: skip


def refuse(key: str, value: Any, reason: str) -> NoReturn:
    key = printable(key)
    shown = json.dumps(value)[:100]
    raise InvalidInput(f"{CONFIG_NAME}: {key} is {shown}: {reason}", param=f"adapter_config.{key}", code=CODE)


def printable(text: str) -> str:
    """Shorten a caller's text and escape it to ASCII, because an answer cannot encode a lone surrogate."""
    return text[:200].encode("ascii", "backslashreplace").decode()


def malformed(reason: str) -> NoReturn:
    raise InvalidInput(f"{CONFIG_NAME}: {reason}", param="adapter_config", code=CODE)
