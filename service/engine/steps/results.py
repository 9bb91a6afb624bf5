"""The results of a step, from its logits: tokens, log-probabilities, and whether they are finite.

Everything is computed on the device when the step is launched. `collect` waits for the device and reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.engine.kv.memory import to_device
from service.engine.sampling.logprobs import PendingLogprobs
from service.engine.sampling.sampler import finite_rows, is_plain_greedy, sample
from service.engine.scheduling.plan import StepPlan
from service.engine.scheduling.request import EngineRequest
from service.engine.wire.messages import Classification, TokenLogprobs


@dataclass(frozen=True)
class StepOutcome:
    """The results of a step. Chunks are known by their index in the plan."""

    #: The next token of every chunk; None if it does not sample.
    token_ids: list[int | None]
    #: Chunks with NaN or infinity in their logits. Their other results mean nothing.
    not_finite: set[int] = field(default_factory=set)
    #: Set for chunks that report log-probabilities of their token.
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    #: Set for chunks that report log-probabilities of the prompt.
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    #: Set for chunks whose hidden state is classified.
    classifications: dict[int, Classification] = field(default_factory=dict)


@dataclass(frozen=True)
class StepLogits:
    """The logits that the model computed in a step."""

    #: [n, V]: first the rows that sample, in the order of their chunks, then those that are scored, then
    #: those that are classified.
    logits: Tensor
    #: int64 [n], the index of the largest logit of each row, if it is known already.
    greedy: Tensor | None = None
    #: bool [n], whether each row is finite, if it is known already.
    is_finite: Tensor | None = None
    #: [c, d], the hidden states that are classified.
    hidden: Tensor | None = None


class PendingResults:
    """The results of a started step. prompt_targets: int64 [rows that are scored]."""

    def __init__(self, plan: StepPlan, step: StepLogits, prompt_targets: Tensor) -> None:
        self._plan = plan
        self._sampling: Sequence[int] = range(len(plan.chunks))
        self._scoring: list[int] = []
        if not plan.is_plain:
            self._sampling = [index for index, chunk in enumerate(plan.chunks) if chunk.samples]
            self._scoring = [index for index, c in enumerate(plan.chunks) for _ in c.prompt_positions]
        self._reported: list[int] = []
        self._logprobs: PendingLogprobs | None = None
        self._prompt_logprobs: PendingLogprobs | None = None
        is_finite = finite_rows(step.logits) if step.is_finite is None else step.is_finite
        #: int64 [rows that sample], on the device.
        self.tokens = self._sample(step)
        if self._scoring:
            num_top = [plan.chunks[index].request.sampling.prompt_logprobs or 0 for index in self._scoring]
            first = len(self._sampling)
            scored = step.logits[first : first + len(self._scoring)]
            self._prompt_logprobs = PendingLogprobs(scored, prompt_targets, num_top)
        self._hidden = None if step.hidden is None else _Host(step.hidden.float())
        self._host = _Host(torch.cat([self.tokens, is_finite.to(torch.int64)]))

    def collect(self) -> StepOutcome:
        """Wait for the device, and return the results."""
        values: list[int] = self._host.read().tolist()
        num_sampled, num_chunks = len(self._sampling), len(self._plan.chunks)
        is_finite = values[num_sampled:]
        token_ids: list[int | None] = [*values[:num_sampled]]
        if num_sampled < num_chunks:
            by_chunk = dict(zip(self._sampling, token_ids, strict=True))
            token_ids = [by_chunk.get(index) for index in range(num_chunks)]
        outcome = StepOutcome(token_ids)
        if not all(is_finite):
            owners = (*self._sampling, *self._scoring, *self._plan.classifying)
            rows = zip(owners, is_finite, strict=True)
            outcome.not_finite.update(index for index, is_row_finite in rows if not is_row_finite)
        if self._logprobs is not None:
            outcome.logprobs.update(zip(self._reported, self._logprobs.reports(), strict=True))
        if self._prompt_logprobs is not None:
            for index, report in zip(self._scoring, self._prompt_logprobs.reports(), strict=True):
                outcome.prompt_logprobs.setdefault(index, []).append(report)
        if self._hidden is not None:
            for index, hidden in zip(self._plan.classifying, self._hidden.read(), strict=True):
                outcome.classifications[index] = classify(self._plan.chunks[index].request, hidden)
        return outcome

    def _sample(self, step: StepLogits) -> Tensor:
        """Sample the next tokens, and compute the log-probabilities that requests report."""
        logits = step.logits[: len(self._sampling)]
        if not self._sampling:
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        if step.greedy is not None and self._plan.is_plain:
            return step.greedy[: len(self._sampling)]
        requests = [self._plan.chunks[index].request for index in self._sampling]
        if step.greedy is not None and all(is_plain_greedy(request) for request in requests):
            tokens = step.greedy[: len(self._sampling)]
        else:
            tokens = sample(logits.float(), requests)
        reporting = [row for row, request in enumerate(requests) if request.sampling.logprobs is not None]
        if reporting:
            num_top = [requests[row].sampling.logprobs or 0 for row in reporting]
            is_all = len(reporting) == len(requests)
            rows = slice(len(reporting)) if is_all else to_device(reporting, logits.device, torch.int64)
            self._reported = [self._sampling[row] for row in reporting]
            self._logprobs = PendingLogprobs(logits[rows], tokens[rows], num_top)
        return tokens


def classify(request: EngineRequest, hidden: Tensor) -> Classification:
    """Apply the head of the request's adapter to its hidden state, float32 [d].

    On the host: at a width of 4,096 a head of 256 labels takes a million multiplications per text, and heads
    on the device would need slots of their own for every number of labels.
    """
    head = request.head
    assert head is not None, "the engine refuses requests that classify without a head"
    return Classification(head.scores(hidden[None])[0].tolist(), list(head.labels))


class _Host:
    """A device tensor that is being copied to the host; nothing waits before `read`."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._values
