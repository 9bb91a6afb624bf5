"""The messages between the API and the engine: requests in, tokens out, and the engine's statistics.

Plain dataclasses of JSON-like fields; `ipc.py` turns them into msgpack and back. They hold token ids only:
the API alone handles text, templates and stop strings.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tessera.formats.adapter_ref import AdapterRef

#: Codes of requests for what an adapter was not trained for: to classify without a head, to generate with
#: one.
NO_HEAD, NOT_GENERATIVE = "no_classification_head", "model_not_generative"


@dataclass(frozen=True)
class SamplingParams:
    """How a request is continued. The API validates these fields (`service/http/schemas/generation.py`)."""

    #: 0 scores the prompt only.
    max_tokens: int = 16
    min_tokens: int = 0
    #: 0 is greedy.
    temperature: float = 1.0
    #: 1.0 is off.
    top_p: float = 1.0
    #: 0 is off.
    top_k: int = 0
    #: 0 is off.
    min_p: float = 0.0
    #: None takes random bits from the operating system.
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    #: How many of the most likely tokens to report beside the chosen one, from the model's own distribution,
    #: before temperature and penalties. None reports nothing.
    logprobs: int | None = None
    #: The same for the tokens of the prompt.
    prompt_logprobs: int | None = None
    #: End the output; eos is among them unless ignore_eos was requested.
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to continue."""

    request_id: str
    #: Separates prefix caches, and is the unit of fairness.
    tenant: str
    token_ids: list[int]
    sampling: SamplingParams
    #: None means the base model alone.
    adapter: AdapterRef | None = None
    #: Seconds after submission at which the engine gives up.
    timeout_s: float | None = None
    #: Apply the adapter's classification head to the last hidden state. Needs max_tokens 0.
    classifies: bool = False
    #: Of two texts for an encoder: the tokens before the second one; otherwise 0.
    first_length: int = 0


@dataclass(frozen=True)
class Classification:
    """The scores that a classification head gave to one text."""

    #: [C], before any softmax.
    scores: list[float]
    #: The names of the classes; empty for a regression.
    labels: list[str]


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of one token, and of the most likely ones."""

    token_id: int
    logprob: float
    #: Pairs of token id and log-probability.
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass  # one per request and step: not frozen, which takes three times as long
class TokenOutput:
    """The output of one step for one request."""

    request_id: str
    #: The new tokens, including the stop token that ended the output.
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    #: Log-probabilities of the prompt's tokens from the second on; sent once, with the first output.
    prompt_logprobs: list[TokenLogprobs] | None = None
    #: None while the request runs, then "stop", "length", "cancelled" or "error".
    finish_reason: str | None = None
    #: (code, message) if finish_reason is "error".
    error: tuple[str, str] | None = None
    #: Prompt tokens that were found in the prefix cache.
    num_cached_tokens: int = 0
    #: Number of different models (adapters, and the base model if present) that shared the step.
    num_distinct: int = 0
    #: Sent with the end of a request that classifies.
    classification: Classification | None = None


@dataclass(frozen=True)
class EngineInfo:
    """The model, device and limits of an engine. Sent when it is ready, and to each later connection."""

    model_name: str
    model_id: str
    vocab_size: int
    #: Most tokens of a request, prompt and output together.
    max_model_len: int
    device: str
    dtype: str
    default_basis_id: str
    pid: int
    #: How the model is run, "fused" or "generic", and why.
    forward_mode: str = ""
    #: Engine processes of the same parent before this one.
    restarts: int = 0


@dataclass(frozen=True)
class EngineStats:
    """The engine's statistics: gauges of this moment, and counters since its start (`*_total`)."""

    num_running: int = 0
    #: Includes num_waiting_for_adapter.
    num_waiting: int = 0
    num_waiting_for_adapter: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    #: Slots of all resident bases, and how many of them hold an adapter or are in use.
    slots: int = 0
    slots_resident: int = 0
    slots_pinned: int = 0
    host_cache_bytes: int = 0
    host_cache_entries: int = 0
    resident_bases: int = 0
    #: Bytes by kind: weights, kv, adapters (slots), bases, workspace, and free (CUDA) or process_rss (CPU).
    memory_bytes: dict[str, int] = field(default_factory=dict)
    steps_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    cached_prompt_tokens_total: int = 0
    preemptions_total: int = 0
    #: Counted by tier: "cached" (host memory) and "resident" (slots).
    adapter_loads_total: dict[str, int] = field(default_factory=dict)
    adapter_load_failures_total: int = 0
    #: Counted by tier, like the loads.
    adapter_evictions_total: dict[str, int] = field(default_factory=dict)
    step_failures_total: int = 0
