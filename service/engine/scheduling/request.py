"""One request inside the engine: what it must satisfy to enter, and its state until it ends.

The HTTP schemas have checked it once already, but they know neither the vocabulary nor the memory. A request
that would break a step must never be in one: a bug in the schemas may cost a request, not a batch. Knows no
queue, and no tensor but the request's random generator.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch

from service.engine.kv.blocks import chain_key
from service.engine.wire.messages import GenerationRequest, SamplingParams, TokenLogprobs
from tessera.errors import InvalidInput
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.head import ClassificationHead

#: The last token while it has been sampled but not yet read from the device.
PENDING = -1

#: The lowest and the highest value of each sampling parameter.
_SAMPLING_RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (0, math.inf),
    "min_tokens": (0, math.inf),
    "temperature": (0, 1e6),
    "top_p": (0, 1),
    "top_k": (0, math.inf),
    "min_p": (0, 1),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "repetition_penalty": (1e-3, 1e3),
    "logprobs": (0, math.inf),
    "prompt_logprobs": (0, math.inf),
}


@dataclass(frozen=True)
class RequestLimits:
    """The limits that every request must keep."""

    #: Token ids are below it.
    vocab_size: int
    #: Most tokens of one request, prompt and output together.
    max_model_len: int

    def check(self, request: GenerationRequest) -> None:
        """Check that a request may enter the engine. Raises `InvalidInput`."""
        sampling, num_prompt = request.sampling, len(request.token_ids)
        if num_prompt == 0:
            raise InvalidInput("the prompt is empty: it needs at least one token", param="prompt")
        for param, token_ids in (("prompt", request.token_ids), ("logit_bias", sampling.logit_bias)):
            for token_id in token_ids:
                if not isinstance(token_id, int) or not 0 <= token_id < self.vocab_size:
                    raise InvalidInput(
                        f"token id {token_id!r} is not a whole number from 0 to {self.vocab_size - 1}",
                        param=param,
                    )
        for name, (low, high) in _SAMPLING_RANGES.items():
            value = getattr(sampling, name)
            if value is not None and not low <= value <= high:  # false for NaN too
                raise InvalidInput(f"{name} must be between {low:g} and {high:g}, got {value}", param=name)
        if sampling.logit_bias and not all(map(math.isfinite, sampling.logit_bias.values())):
            raise InvalidInput("logit_bias must hold finite numbers", param="logit_bias")
        if num_prompt + sampling.max_tokens > self.max_model_len:
            raise InvalidInput(
                f"the prompt has {num_prompt} tokens and max_tokens is {sampling.max_tokens}, together "
                f"{num_prompt + sampling.max_tokens}; this model serves up to {self.max_model_len}",
                param="prompt" if num_prompt >= self.max_model_len else "max_tokens",
                code="context_length_exceeded",
            )
        if request.classifies and sampling.max_tokens > 0:
            raise InvalidInput("a request that classifies generates no tokens", param="max_tokens")
        if request.timeout_s is not None and not request.timeout_s > 0:
            raise InvalidInput(f"timeout_s must be above 0, got {request.timeout_s}", param="timeout_s")


@dataclass(eq=False)
class EngineRequest:
    """A request and its progress.

    What every step reads of every request is a plain attribute, copied from the submitted request or computed
    once.
    """

    #: The request as the API sent it.
    submitted: GenerationRequest
    #: Running number of the submission.
    number: int
    #: The root of its prefix keys, see `kv/blocks.py`.
    root_key: bytes
    #: Its own, so that its draws do not depend on the other requests of the batch; None if it draws nothing.
    #: Survives a preemption.
    generator: torch.Generator | None = None
    #: Prompt, then output. Survives a preemption.
    token_ids: list[int] = field(init=False)
    #: Number of leading tokens with their KV in `blocks`.
    num_computed: int = 0
    #: Its KV blocks, in order.
    blocks: list[int] = field(default_factory=list)
    #: Number of leading blocks that are registered under their prefix keys.
    num_registered: int = 0
    #: Index into the slot table of its basis; 0 for the base model.
    slot: int = 0
    is_pinned: bool = False
    is_running: bool = False
    #: Whether its tenant has been charged for it, which happens once.
    is_charged: bool = False
    #: Whether its last output has been made.
    has_ended: bool = False
    #: Whether it may share KV blocks with other requests: until its adapter is unloaded.
    may_share: bool = True
    #: Prompt tokens found in the prefix cache when it first started; None before.
    num_cached_tokens: int | None = None
    #: The scheduling pass since which it has lacked a slot.
    blocked_since_pass: int | None = None
    #: The classification head of its adapter, from the time when that has a slot; None if it has none.
    head: ClassificationHead | None = None
    #: How often each token occurs in its output; kept only if it has rules.
    output_counts: Counter[int] = field(default_factory=Counter)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        submitted, sampling, adapter = self.submitted, self.submitted.sampling, self.submitted.adapter
        self.token_ids = list(submitted.token_ids)
        self.request_id: str = submitted.request_id
        self.tenant: str = submitted.tenant
        self.sampling: SamplingParams = sampling
        self.adapter: AdapterRef | None = adapter
        self.basis_id: str | None = None if adapter is None else adapter.basis_id
        #: Tenant and adapter id, by which `unload` finds the request; None for the base model.
        self.adapter_key = None if adapter is None else (adapter.tenant, adapter.adapter_id)
        #: An identifier of the adapter version, or of the base model. A string caches its hash, an AdapterRef
        #: computes it.
        self.model_key: str = repr(adapter)
        self.num_prompt: int = len(submitted.token_ids)
        #: Most tokens that it may have, prompt and output together.
        self.max_length: int = self.num_prompt + sampling.max_tokens
        #: Whether it has penalties or a bias, see `sampling/sampler.py`.
        self.has_rules: bool = (
            sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
            or sampling.repetition_penalty != 1
            or bool(sampling.logit_bias)
        )
        #: Whether its logits may ever be changed: by these, or because its output must not end yet.
        self.may_have_rules: bool = self.has_rules or (
            sampling.min_tokens > 0 and bool(sampling.stop_token_ids)
        )
        #: Whether its last hidden state is classified.
        self.classifies: bool = submitted.classifies
        #: Whether log-probabilities of the prompt are requested and not sent yet.
        self.needs_prompt_logprobs: bool = sampling.prompt_logprobs is not None
        #: Whether its next token is always the largest of the model's own logits, and nothing else is
        #: reported.
        self.is_plain: bool = (
            self.generator is None
            and not self.may_have_rules
            and sampling.logprobs is None
            and sampling.prompt_logprobs is None
        )
        self._block_keys: list[bytes] = []

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @cached_property
    def prompt_set(self) -> frozenset[int]:
        return frozenset(self.submitted.token_ids)

    @property
    def is_pending(self) -> bool:
        """Whether its last token is not known yet."""
        return self.token_ids[-1] == PENDING

    @property
    def awaits_end(self) -> bool:
        """Whether its last token is not known yet and the last one that it may have."""
        return self.is_pending and len(self.token_ids) >= self.max_length

    def append(self, token_id: int) -> None:
        """Add a token, or fill in the one that was pending."""
        if self.token_ids[-1] == PENDING:
            self.token_ids[-1] = token_id
        else:
            self.token_ids.append(token_id)
        if self.has_rules:
            self.output_counts[token_id] += 1

    def block_key(self, index: int, block_size: int) -> bytes:
        """Return the prefix key of block `index`, which must hold known tokens only."""
        while len(self._block_keys) <= index:
            start = len(self._block_keys) * block_size
            assert start + block_size <= self.num_tokens - self.is_pending
            parent = self._block_keys[-1] if self._block_keys else self.root_key
            self._block_keys.append(chain_key(parent, self.token_ids[start : start + block_size]))
        return self._block_keys[index]

    def forget_kv(self) -> None:
        """Start again without any KV; tokens, slot and random state stay."""
        self.blocks = []
        self.num_computed = self.num_registered = 0
        if self.needs_prompt_logprobs:
            self.prompt_logprobs = []
