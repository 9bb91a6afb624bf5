"""The requests in flight, and what is to be told to those who sent them.

Every request that was taken in gets exactly one last output, whatever ends it, and is forgotten with it.
"""

from __future__ import annotations

import heapq
import time

from service.engine.scheduling.plan import StepPlan
from service.engine.scheduling.request import EngineRequest
from service.engine.scheduling.scheduler import Scheduler
from service.engine.steps.results import StepOutcome
from service.engine.wire.messages import TokenOutput

#: Deadlines of requests that have ended are kept up to here, so that they are dropped many at a time.
MAX_PAST_DEADLINES = 256


class InFlight:
    """Owns every request from submission to its last output; `scheduler` is told when one has ended."""

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
        """Whether there are outputs to be taken, or a deadline has passed."""
        return bool(self._outputs or (self._deadlines and self._deadlines[0][0] <= time.monotonic()))

    def add(self, request: EngineRequest) -> None:
        """Take a request in; its deadline runs from now."""
        self._requests[request.request_id] = request
        if request.submitted.deadline_s is not None:
            expires_at = time.monotonic() + request.submitted.deadline_s
            heapq.heappush(self._deadlines, (expires_at, request.order, request.request_id))
            self._forget_deadlines()

    def deliver(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Send what the chunks of a step brought: a token, the prompt's log-probabilities, the end; nothing
        to those that have ended meanwhile."""
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
        """Fail those whose deadline has passed."""
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, order, request_id = heapq.heappop(self._deadlines)
            request = self._requests.get(request_id)
            if request is not None and request.order == order:
                self.fail(
                    request, "deadline_exceeded", f"not finished within {request.submitted.deadline_s:g} s"
                )

    def take_outputs(self) -> list[TokenOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def check_integrity(self) -> None:
        scheduled = [s.request_id for s in (*self._scheduler.running, *self._scheduler.waiting)]
        assert sorted(scheduled) == sorted(self._requests)

    def _end(self, request: EngineRequest, finish_reason: str, error: tuple[str, str] | None) -> None:
        num_cached_tokens = request.num_cached_tokens or 0
        self._outputs.append(
            TokenOutput(
                request.request_id,
                finish_reason=finish_reason,
                error=error,
                num_cached_tokens=num_cached_tokens,
            )
        )
        self._forget(request)

    def _forget_deadlines(self) -> None:
        """Drop those of requests that have ended, once they are the most: they may lie far ahead, and at a
        thousand requests a second those of ten minutes would take 100 MB."""
        if len(self._deadlines) > 2 * len(self._requests) + MAX_PAST_DEADLINES:
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self._requests]
            heapq.heapify(self._deadlines)

    def _forget(self, request: EngineRequest) -> None:
        del self._requests[request.request_id]
        request.has_ended = True
        self._scheduler.remove(request)
