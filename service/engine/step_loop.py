"""The engine's loop, one turn at a time: plan a step, start it, hand over what the step before brought.

    without lookahead    plan n, run n, deliver n
    with lookahead       plan n, start n, deliver n - 1       while the device works on n

With lookahead a plan is made before the last tokens are known: a sequence's newest token is pending, and
its id is taken on the device. One that turns out to have ended (stop token, cancellation, deadline) has a
row too many in the step under way, whose result is dropped. Its blocks may be given away at once: whoever
gets them is computed after that row, on the same stream. So may its slot: at worst that row reads half of
another adapter.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from service.engine.in_flight import InFlight
from service.engine.logit_rules import has_rules
from service.engine.plan import StepPlan
from service.engine.runner import ModelRunner
from service.engine.scheduler import Scheduler
from service.engine.step_results import PendingResults, StepOutcome

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
        started = self._start(plan) if plan.chunks else None
        previous, self._under_way = self._under_way, None
        if previous is not None:
            self._finish(previous)
        if started is None:
            return
        if self._looks_ahead and _can_wait(plan):
            self._scheduler.advance(plan)
            self._under_way = started
        else:
            self._finish(started)

    def _start(self, plan: StepPlan) -> _UnderWay | None:
        try:
            return _UnderWay(plan, self._runner.launch(plan))
        except Exception as error:
            self._fail(plan, error)
            return None

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
            self._in_flight.fail(plan.chunks[index].sequence, "non_finite_logits", message)
        self._scheduler.commit(plan.chunks)
        self._in_flight.deliver(plan, outcome)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """The step failed: so do the requests that were in it, and no others."""
        logger.error("a step of %d tokens failed", plan.num_tokens, exc_info=error)
        self.num_failed += 1
        for chunk in plan.chunks:
            self._in_flight.fail(chunk.sequence, "step_failed", f"the step failed: {error}")
        if isinstance(error, torch.AcceleratorError):
            raise error


def _can_wait(plan: StepPlan) -> bool:
    """Whether the next step can be planned and started before this one's tokens are known. Penalties and the
    like take them; log-probabilities of a prompt are kept with the sequence, which may be preempted."""
    return plan.is_plain or not any(
        chunk.prompt_positions or (chunk.samples and has_rules(chunk.sequence)) for chunk in plan.chunks
    )
