"""What travels between the API and the engine: requests in, tokens out, and the engine's own figures.

Plain dataclasses of JSON-like fields, sent as msgpack maps. Token ids only: text, templates and stop strings
are the API's business.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from tessera.formats.adapter_ref import AdapterRef


class Message:
    """Conversion to and from a msgpack map; unknown fields are refused by the constructor."""

    def to_map(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_map(cls, values: dict[str, Any]) -> Self:
        return cls(**values)


@dataclass(frozen=True)
class SamplingParams(Message):
    """How one sequence is continued. Already validated (`service/http/schemas/common.py`).

    max_tokens 0 scores the prompt only. temperature 0 is greedy. top_k 0 and top_p 1.0 are off. seed None
    draws one from the operating system. logprobs: how many of the most likely tokens to report beside the
    chosen one (None: report nothing), from the model's own distribution, before temperature and penalties.
    stop_token_ids end the sequence; eos is among them unless ignore_eos was asked for.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class GenerationRequest(Message):
    """One sequence to continue. adapter None means the base model alone. tenant salts the prefix cache and is
    the unit of fairness. deadline_s: give up this many seconds after submission."""

    request_id: str
    tenant: str
    token_ids: list[int]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    deadline_s: float | None = None

    @classmethod
    def from_map(cls, values: dict[str, Any]) -> Self:
        adapter = values["adapter"]
        sampling = {**values["sampling"], "stop_token_ids": tuple(values["sampling"]["stop_token_ids"])}
        return cls(
            **{
                **values,
                "sampling": SamplingParams(**sampling),
                "adapter": AdapterRef(**adapter) if adapter else None,
            }
        )


@dataclass(frozen=True)
class TokenLogprobs(Message):
    """The log-probability of one token, and of the most likely ones: pairs (token id, log-probability)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass  # one per request and step: not frozen, which takes three times as long
class TokenOutput(Message):
    """What one step brought one request.

    token_ids: the new tokens, with the stop token that ended the sequence, if one did. finish_reason: None
    while running, else "stop", "length", "cancelled" or "error". error: (code, message) where it is "error".
    prompt_logprobs: for tokens 1.. of the prompt, sent once, with the first output. num_cached_tokens: prompt
    tokens found in the prefix cache. num_distinct: how many different models (adapters, and the base if
    present) shared the step.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    error: tuple[str, str] | None = None
    num_cached_tokens: int = 0
    num_distinct: int = 0

    @classmethod
    def from_map(cls, values: dict[str, Any]) -> Self:
        prompt = values.get("prompt_logprobs")
        error = values.get("error")
        return cls(
            **{
                **values,
                "logprobs": [_token_logprobs(v) for v in values.get("logprobs", [])],
                "prompt_logprobs": None if prompt is None else [_token_logprobs(v) for v in prompt],
                "error": tuple(error) if error else None,
            }
        )


def _token_logprobs(values: dict[str, Any]) -> TokenLogprobs:
    return TokenLogprobs(values["token_id"], values["logprob"], [(t, lp) for t, lp in values["top"]])


@dataclass(frozen=True)
class EngineInfo(Message):
    """What the engine is, told once when it is ready. max_model_len: prompt plus output, in tokens. restarts:
    engine processes of the same parent before this one."""

    model_name: str
    model_id: str
    vocab_size: int
    max_model_len: int
    device: str
    dtype: str
    default_basis_id: str
    pid: int
    forward_mode: str = ""
    restarts: int = 0


@dataclass(frozen=True)
class EngineStats(Message):
    """The engine's figures: gauges as they are now, counters since its start (names end in _total).

    num_waiting includes num_waiting_for_adapter. slots: over all resident bases. adapter_loads_total,
    adapter_evictions_total: by tier, "cached" (host memory) and "resident" (slots).
    memory_bytes by kind: weights, kv, adapters (slots), bases, workspace, free (CUDA) or process_rss (CPU).
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_for_adapter: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    slots: int = 0
    slots_resident: int = 0
    slots_pinned: int = 0
    host_cache_bytes: int = 0
    host_cache_entries: int = 0
    resident_bases: int = 0
    memory_bytes: dict[str, int] = field(default_factory=dict)
    steps_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    cached_prompt_tokens_total: int = 0
    preemptions_total: int = 0
    adapter_loads_total: dict[str, int] = field(default_factory=dict)
    adapter_load_failures_total: int = 0
    adapter_evictions_total: dict[str, int] = field(default_factory=dict)
    step_failures_total: int = 0
