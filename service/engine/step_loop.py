"""Turn plans into outputs: steps that have been started, and the requests in flight that they serve.

    without lookahead    plan n, run n, deliver n
    with lookahead       plan n, start n, deliver n - 1       while the device works on n

With lookahead a plan is made before the last tokens are known: the newest token of a request is pending, and
its id is taken on the device. A request that turns out to have ended (stop token, cancellation, deadline) has
a superfluous row in the running step, and its result is dropped. Its blocks may be given away at once: the
new holder is computed after that row, on the same stream. So may its slot: at worst that row reads half of
another adapter.

If the model fails to compute a step, the step is computed again in parts, so that only the requests that make
it fail are lost.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from service.engine.encoder.runner import EncoderResults, EncoderRunner
from service.engine.sampling.sampler import has_active_rules
from service.engine.scheduling.plan import Chunk, StepPlan
from service.engine.scheduling.request import EngineRequest
from service.engine.scheduling.scheduler import Scheduler
from service.engine.steps.results import PendingResults, StepOutcome
from service.engine.steps.runner import ModelRunner, StepNotComputed
from service.engine.wire.messages import TokenOutput

logger = logging.getLogger(__name__)

#: Deadlines of ended requests are kept up to this number, so that many are dropped at a time.
MAX_PAST_DEADLINES = 256


class InFlight:
    """Owns every request from submission to its last output, and removes ended ones from `scheduler`.

    Every submitted request gets exactly one last output, whatever ends it, and is forgotten with it.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.num_generated = 0
        self._scheduler = scheduler
        self._requests: dict[str, EngineRequest] = {}
        self._deadlines: list[tuple[float, int, str]] = []  # a heap
        self._outputs: list[TokenOutput] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    @property
    def has_news(self) -> bool:
        """Whether there are outputs to take, or a deadline has passed."""
        return bool(self._outputs or (self._deadlines and self._deadlines[0][0] <= time.monotonic()))

    def add(self, request: EngineRequest) -> None:
        """Take a request in. Its deadline runs from now."""
        self._requests[request.request_id] = request
        if request.submitted.timeout_s is not None:
            expires_at = time.monotonic() + request.submitted.timeout_s
            heapq.heappush(self._deadlines, (expires_at, request.number, request.request_id))
            # Deadlines may lie far ahead: at a thousand requests a second those of ten minutes would take
            # 100 MB. So drop those of ended requests once they are the majority.
            if len(self._deadlines) > 2 * len(self._requests) + MAX_PAST_DEADLINES:
                self._deadlines = [entry for entry in self._deadlines if entry[2] in self._requests]
                heapq.heapify(self._deadlines)

    def deliver(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Make the outputs of a step: a token, the log-probabilities or the class of the prompt, the end.
        Requests that have ended meanwhile get none."""
        num_distinct, logprobs = plan.num_distinct, outcome.logprobs
        for index, scored in outcome.prompt_logprobs.items():
            plan.chunks[index].request.prompt_logprobs += scored
        for index, (chunk, token_id) in enumerate(zip(plan.chunks, outcome.token_ids, strict=True)):
            request = chunk.request
            if request.has_ended or not chunk.is_last:
                continue
            finish_reason = None
            if token_id is not None:
                request.append(token_id)
                self.num_generated += 1
                if token_id in request.sampling.stop_token_ids:
                    finish_reason = "stop"
            if finish_reason is None and len(request.token_ids) >= request.max_length:
                finish_reason = "length"
            output = TokenOutput(
                request.request_id,
                [] if token_id is None else [token_id],
                [logprobs[index]] if token_id is not None and index in logprobs else [],
                request.prompt_logprobs if request.needs_prompt_logprobs else None,
                finish_reason,
                None,
                request.num_cached_tokens or 0,
                num_distinct,
                outcome.classifications.get(index),
            )
            request.needs_prompt_logprobs = False
            self._outputs.append(output)
            if finish_reason is not None:
                self._forget(request)

    def cancel(self, request_id: str) -> None:
        """End a request, unless it has ended already."""
        if request_id in self._requests:
            self._end(self._requests[request_id], "cancelled", None)

    def fail(self, request: EngineRequest, code: str, message: str) -> None:
        """End a request with an error, unless it has ended already."""
        if not request.has_ended:
            self._end(request, "error", (code, message))

    def expire(self) -> None:
        """Fail the requests whose deadline has passed."""
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number, request_id = heapq.heappop(self._deadlines)
            request = self._requests.get(request_id)
            if request is not None and request.number == number:
                message = f"not finished within {request.submitted.timeout_s:g} s"
                self.fail(request, "deadline_exceeded", message)

    def take_outputs(self) -> list[TokenOutput]:
        """Return the outputs since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def check_integrity(self) -> None:
        requests = (*self._scheduler.running, *self._scheduler.waiting)
        scheduled = [request.request_id for request in requests]
        assert sorted(scheduled) == sorted(self._requests)

    def _end(self, request: EngineRequest, finish_reason: str, error: tuple[str, str] | None) -> None:
        output = TokenOutput(
            request.request_id,
            finish_reason=finish_reason,
            error=error,
            num_cached_tokens=request.num_cached_tokens or 0,
        )
        self._outputs.append(output)
        self._forget(request)

    def _forget(self, request: EngineRequest) -> None:
        del self._requests[request.request_id]
        request.has_ended = True
        self._scheduler.remove(request)


@dataclass(frozen=True)
class StartedStep:
    """A step that the device works on, or that the model failed to compute."""

    plan: StepPlan
    results: PendingResults | EncoderResults | StepNotComputed

    @property
    def can_wait(self) -> bool:
        """Whether the next step can be planned and started before the tokens of this one are known. Penalties
        and other rules need the tokens. Log-probabilities of a prompt are collected in the request, which may
        be preempted."""
        if isinstance(self.results, StepNotComputed):
            return False
        return self.plan.is_plain or not any(
            chunk.prompt_positions or (chunk.samples and has_active_rules(chunk.request))
            for chunk in self.plan.chunks
        )


class StepLoop:
    """Starts the steps that `scheduler` plans, and delivers their results to `in_flight`."""

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner | EncoderRunner, in_flight: InFlight
    ) -> None:
        #: Number of steps that were delivered.
        self.num_steps = 0
        #: Number of steps that failed.
        self.num_failed = 0
        #: Seconds that the host has waited for the device.
        self.wait_s = 0.0
        #: The step that has been started and not delivered, if there is one.
        self.unfinished: StartedStep | None = None
        self._scheduler = scheduler
        self._runner = runner
        self._in_flight = in_flight

    def start(self, plan: StepPlan) -> StartedStep | None:
        """Start a step. Returns None if it is empty, or if its requests have failed."""
        if not plan.chunks:
            return None
        try:
            return StartedStep(plan, self._runner.launch(plan))
        except StepNotComputed as failure:
            return StartedStep(plan, failure)
        except Exception as error:
            self._fail(plan, error)
            return None

    def finish_later(self, step: StartedStep) -> None:
        """Leave a step to `finish_previous`, and let the scheduler plan as if it was computed."""
        self._scheduler.advance(step.plan)
        self.unfinished = step

    def finish_previous(self) -> None:
        """Wait for the step that was left to later, if there is one, and deliver its results."""
        step, self.unfinished = self.unfinished, None
        if step is not None:
            self.finish(step)

    def finish(self, step: StartedStep) -> None:
        """Wait for a step and deliver its results. If the model failed to compute it, compute it in parts."""
        if isinstance(step.results, StepNotComputed):
            self._compute_in_parts(step.plan, step.results)
            return
        started_at = time.perf_counter()
        try:
            outcome = step.results.collect()
        except Exception as error:
            self._fail(step.plan, error)
            return
        self.wait_s += time.perf_counter() - started_at
        self._deliver(step.plan, outcome)

    def _compute_in_parts(self, plan: StepPlan, failure: StepNotComputed) -> None:
        """Compute a failed step in ever smaller parts, and fail the requests that fail alone.

        Nothing was sampled when the step failed, and the parts write the K and V that it wrote once more,
        each token to the same place. The tokens of the step before are known by now.
        """
        logger.error("a step of %d tokens failed; trying it in parts", plan.num_tokens, exc_info=failure)
        self.num_failed += 1
        chunks = [Chunk(c.request, c.start, c.length) for c in plan.chunks if not c.request.has_ended]
        self._runner.clear(plan.fresh_blocks)
        parts = _halves(chunks)
        if len(chunks) == 1:
            self._in_flight.fail(chunks[0].request, "step_failed", f"the step failed: {failure}")
        while parts:
            part = StepPlan(parts.pop())
            try:
                outcome = self._runner.launch(part, op_by_op=True).collect()
            except StepNotComputed as again:
                if len(part.chunks) > 1:
                    parts += _halves(part.chunks)
                else:
                    request = part.chunks[0].request
                    logger.error("request %s makes a step fail: %s", request.request_id, again)
                    self._in_flight.fail(request, "step_failed", f"the step failed: {again}")
            except Exception as error:
                if isinstance(error, torch.AcceleratorError):
                    part = StepPlan([*part.chunks, *itertools.chain.from_iterable(parts)])
                self._fail(part, error)
            else:
                self._deliver(part, outcome)

    def _deliver(self, plan: StepPlan, outcome: StepOutcome) -> None:
        self.num_steps += 1
        for index in outcome.not_finite:
            message = "the model's output is not finite; the adapter holds extreme values"
            self._in_flight.fail(plan.chunks[index].request, "non_finite_logits", message)
        self._scheduler.commit(plan.chunks)
        self._in_flight.deliver(plan, outcome)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """Fail the requests that were in a failed step, and no others. Raises an accelerator's own errors."""
        logger.error("a step of %d tokens failed", plan.num_tokens, exc_info=error)
        self.num_failed += 1
        for chunk in plan.chunks:
            self._in_flight.fail(chunk.request, "step_failed", f"the step failed: {error}")
        if isinstance(error, torch.AcceleratorError):
            raise error


def _halves(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Two parts of a step, each in its order; rows of one adapter stay together. A single chunk has none."""
    if len(chunks) < 2:
        return []
    adapters = [(chunk.request.basis_id or "", chunk.request.slot) for chunk in chunks]
    by_adapter = sorted(range(len(chunks)), key=adapters.__getitem__)
    middle = len(chunks) // 2
    return [[chunks[i] for i in sorted(half)] for half in (by_adapter[:middle], by_adapter[middle:])]
