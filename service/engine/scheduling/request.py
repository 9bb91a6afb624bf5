"""One request inside the engine: its tokens, its KV blocks, its slot, its randomness.

Knows no queue and no tensor but its own random generator.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch

from service.engine.scheduling.prefix_keys import chain_key
from service.engine.wire.messages import GenerationRequest, SamplingParams, TokenLogprobs
from tessera.formats.adapter_ref import AdapterRef

#: Stands for the last token where it has been sampled but not yet read from the device.
PENDING = -1


@dataclass(eq=False)
class EngineRequest:
    """A request and how far it has come.

    order: running number of its submission. token_ids: prompt, then output. num_computed: leading tokens
    whose KV is in `blocks`. slot: index into its basis' slot table, 0 for the base model. generator: its own,
    so that what it draws does not depend on who shares the batch; it survives a preemption, as do the tokens.
    is_charged: its tenant has been charged for it, which happens once. has_ended: its last output is made.
    may_share: its KV blocks may be others' and others may have them, until its adapter is unloaded.

    What is read of every sequence in every step is a plain attribute, copied from the request or worked out
    once. owner: what `unload` of its adapter names; None for the base model. max_length: prompt and output
    together, at most. model_name: of the adapter version or the base model, equal where they are. has_rules:
    it asks for penalties or a bias (`logit_rules.py`). is_plain: its next token is always the largest of the
    model's own logits, and nothing else is reported. needs_prompt_logprobs: they are wanted and not sent yet.
    output_counts: of the tokens of its output, kept only where it has rules.
    """

    submitted: GenerationRequest
    order: int
    root_key: bytes
    generator: torch.Generator | None = None
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    num_registered: int = 0
    slot: int = 0
    is_pinned: bool = False
    is_running: bool = False
    is_charged: bool = False
    has_ended: bool = False
    may_share: bool = True
    num_cached_tokens: int | None = None
    blocked_since_pass: int | None = None
    output_counts: Counter[int] = field(default_factory=Counter)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        submitted = self.submitted
        sampling = submitted.sampling
        self.token_ids = list(submitted.token_ids)
        self.request_id: str = submitted.request_id
        self.tenant: str = submitted.tenant
        self.adapter: AdapterRef | None = submitted.adapter
        self.owner = (
            None if submitted.adapter is None else (submitted.adapter.tenant, submitted.adapter.adapter_id)
        )
        self.sampling: SamplingParams = sampling
        self.basis_id: str | None = None if submitted.adapter is None else submitted.adapter.basis_id
        self.model_name: str = repr(submitted.adapter)  # a string knows its hash, an AdapterRef computes it
        self.num_prompt: int = len(submitted.token_ids)
        self.max_length: int = self.num_prompt + sampling.max_tokens
        self.has_rules: bool = _has_rules(sampling)
        self.needs_prompt_logprobs: bool = sampling.prompt_logprobs is not None
        self.is_plain: bool = (
            self.generator is None
            and not self.has_rules
            and not (sampling.min_tokens > 0 and sampling.stop_token_ids)
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
        """Whether the token that is not known yet is the last one that it may have."""
        return self.is_pending and len(self.token_ids) >= self.max_length

    def append(self, token_id: int) -> None:
        """One token more, or the one that was pending."""
        if self.token_ids[-1] == PENDING:
            self.token_ids[-1] = token_id
        else:
            self.token_ids.append(token_id)
        if self.has_rules:
            self.output_counts[token_id] += 1

    def block_key(self, index: int, block_size: int) -> bytes:
        """The prefix key of block `index`, all of whose tokens must be known."""
        while len(self._block_keys) <= index:
            start = len(self._block_keys) * block_size
            assert start + block_size <= self.num_tokens - self.is_pending
            parent = self._block_keys[-1] if self._block_keys else self.root_key
            self._block_keys.append(chain_key(parent, self.token_ids[start : start + block_size]))
        return self._block_keys[index]

    def forget_kv(self) -> None:
        """Begin again without any KV; tokens, slot and random state stay."""
        self.blocks = []
        self.num_computed = self.num_registered = 0
        if self.needs_prompt_logprobs:
            self.prompt_logprobs = []


def _has_rules(sampling: SamplingParams) -> bool:
    penalties = (sampling.repetition_penalty - 1, sampling.frequency_penalty, sampling.presence_penalty)
    return any(penalties) or bool(sampling.logit_bias)
