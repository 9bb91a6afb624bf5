"""The engine's loop, one turn at a time: plan a step, start it, hand over what the step before brought.

    without lookahead    plan n, run n, deliver n
    with lookahead       plan n, start n, deliver n - 1       while the device works on n

With lookahead a plan is made before the last tokens are known: a request's newest token is pending, and
its id is taken on the device. One that turns out to have ended (stop token, cancellation, deadline) has a
row too many in the step under way, whose result is dropped. Its blocks may be given away at once: whoever
gets them is computed after that row, on the same stream. So may its slot: at worst that row reads half of
another adapter.

A step that the model fails to compute is computed again in parts, so that it costs only the requests that
make it fail.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from service.engine.in_flight import InFlight
from service.engine.sampling.logit_rules import has_rules
from service.engine.scheduling.plan import Chunk, StepPlan
from service.engine.scheduling.scheduler import Scheduler
from service.engine.steps.results import PendingResults, StepOutcome
from service.engine.steps.runner import ModelRunner, StepNotComputed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _UnderWay:
    plan: StepPlan
    results: PendingResults


class StepLoop:
    """Turns plans of `scheduler` into outputs of `in_flight`. num_steps: delivered; num_failed: steps that
    failed; wait_s: seconds that the host has waited for the device."""

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, in_flight: InFlight, *, looks_ahead: bool
    ) -> None:
        self.num_steps = self.num_failed = 0
        self.wait_s = 0.0
        self._scheduler = scheduler
        self._runner = runner
        self._in_flight = in_flight
        self._looks_ahead = looks_ahead
        self._under_way: _UnderWay | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a step has been started and not delivered."""
        return self._under_way is not None

    def turn(self) -> None:
        """One iteration. Raises nothing but an accelerator's own errors."""
        self._in_flight.expire()
        plan = self._scheduler.schedule()
        started, failure = self._start(plan) if plan.chunks else (None, None)
        previous, self._under_way = self._under_way, None
        if previous is not None:
            self._finish(previous)
        if failure is not None:
            self._compute_in_parts(plan, failure)
        if started is None:
            return
        if self._looks_ahead and _can_wait(plan):
            self._scheduler.advance(plan)
            self._under_way = started
        else:
            self._finish(started)

    def _start(self, plan: StepPlan) -> tuple[_UnderWay | None, StepNotComputed | None]:
        """The step under way, or why the model could not compute it; neither if its requests have failed."""
        try:
            return _UnderWay(plan, self._runner.launch(plan)), None
        except StepNotComputed as failure:
            return None, failure
        except Exception as error:
            self._fail(plan, error)
            return None, None

    def _compute_in_parts(self, plan: StepPlan, failure: StepNotComputed) -> None:
        """Compute a step that failed in ever smaller parts, and fail the requests that fail alone.

        Nothing was sampled when it failed, and what it wrote of K and V is written again by the parts: each
        token to its own place. The tokens of the step before are known by now.
        """
        logger.error("a step of %d tokens failed; it is tried in parts", plan.num_tokens, exc_info=failure)
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

    def _finish(self, step: _UnderWay) -> None:
        began = time.perf_counter()
        try:
            outcome = step.results.collect()
        except Exception as error:
            self._fail(step.plan, error)
            return
        self.wait_s += time.perf_counter() - began
        self._deliver(step.plan, outcome)

    def _deliver(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Turn the outcome of a step into outputs, and end what is complete."""
        self.num_steps += 1
        for index in outcome.not_finite:
            message = "the model's output is not finite; the adapter holds extreme values"
            self._in_flight.fail(plan.chunks[index].request, "non_finite_logits", message)
        self._scheduler.commit(plan.chunks)
        self._in_flight.deliver(plan, outcome)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """The step failed: so do the requests that were in it, and no others."""
        logger.error("a step of %d tokens failed", plan.num_tokens, exc_info=error)
        self.num_failed += 1
        for chunk in plan.chunks:
            self._in_flight.fail(chunk.request, "step_failed", f"the step failed: {error}")
        if isinstance(error, torch.AcceleratorError):
            raise error


def _halves(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Two parts of a step, each in its order; rows of an adapter stay together. Nothing of one chunk."""
    if len(chunks) < 2:
        return []
    owners = [(chunk.request.basis_id or "", chunk.request.slot) for chunk in chunks]
    by_adapter = sorted(range(len(chunks)), key=owners.__getitem__)
    middle = len(chunks) // 2
    return [[chunks[i] for i in sorted(half)] for half in (by_adapter[:middle], by_adapter[middle:])]


def _can_wait(plan: StepPlan) -> bool:
    """Whether the next step can be planned and started before this one's tokens are known. Penalties and the
    like take them; log-probabilities of a prompt are kept with the request, which may be preempted."""
    return plan.is_plain or not any(
        chunk.prompt_positions or (chunk.samples and has_rules(chunk.request)) for chunk in plan.chunks
    )
