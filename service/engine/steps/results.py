"""What a step brought, from its logits: tokens, log-probabilities, and whether they can be believed.

Everything is computed on the device when the step is launched; `collect` waits for the device and reads.
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
from service.engine.wire.messages import TokenLogprobs


@dataclass(frozen=True)
class StepOutcome:
    """What the step brought its chunks, which are known by their index in the plan.

    token_ids: of all chunks, None where nothing was to be sampled. not_finite: those whose logits hold NaN or
    infinity; whatever else is said of them means nothing. logprobs, prompt_logprobs: where they are wanted.
    """

    token_ids: list[int | None]
    not_finite: set[int] = field(default_factory=set)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


@dataclass(frozen=True)
class StepLogits:
    """logits: [n, V], rows that sample first, in the order of their chunks, then those that are scored.
    greedy: int64 [n], the largest of each row, and is_finite: bool [n], where they are known already."""

    logits: Tensor
    greedy: Tensor | None = None
    is_finite: Tensor | None = None


class PendingResults:
    """The results of one step under way. tokens: int64 [rows that sample], on the device.

    prompt_targets: int64 [rows that are scored].
    """

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
        self.tokens = self._sample(step)
        if self._scoring:
            num_top = [plan.chunks[index].request.sampling.prompt_logprobs or 0 for index in self._scoring]
            scored = step.logits[len(self._sampling) :]
            self._prompt_logprobs = PendingLogprobs(scored, prompt_targets, num_top)
        self._host = _Host(torch.cat([self.tokens, is_finite.to(torch.int64)]))

    def collect(self) -> StepOutcome:
        """Waits for the device."""
        values, num_sampled, num_chunks = self._host.read(), len(self._sampling), len(self._plan.chunks)
        is_finite = values[num_sampled:]
        token_ids: list[int | None] = [*values[:num_sampled]]
        if num_sampled < num_chunks:
            by_chunk = dict(zip(self._sampling, token_ids, strict=True))
            token_ids = [by_chunk.get(index) for index in range(num_chunks)]
        outcome = StepOutcome(token_ids)
        if not all(is_finite):
            rows = zip((*self._sampling, *self._scoring), is_finite, strict=True)
            outcome.not_finite.update(index for index, is_row_finite in rows if not is_row_finite)
        if self._logprobs is not None:
            outcome.logprobs.update(zip(self._reported, self._logprobs.reports(), strict=True))
        if self._prompt_logprobs is not None:
            for index, report in zip(self._scoring, self._prompt_logprobs.reports(), strict=True):
                outcome.prompt_logprobs.setdefault(index, []).append(report)
        return outcome

    def _sample(self, step: StepLogits) -> Tensor:
        """The next tokens, and their log-probabilities where they are wanted."""
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
        wanted = [row for row, request in enumerate(requests) if request.sampling.logprobs is not None]
        if wanted:
            num_top = [requests[row].sampling.logprobs or 0 for row in wanted]
            is_all = len(wanted) == len(requests)
            rows = slice(len(wanted)) if is_all else to_device(wanted, logits.device, torch.int64)
            self._reported = [self._sampling[row] for row in wanted]
            self._logprobs = PendingLogprobs(logits[rows], tokens[rows], num_top)
        return tokens


class _Host:
    """A device tensor on its way to the host: nothing waits before `read`. values: int64 [n]."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()  # type: ignore[no-any-return]
