"""Runs an engine as its process does: fetch what is missing, step, and collect the outputs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from service.engine.engine import Engine
from service.engine.wire.messages import GenerationRequest, SamplingParams, TokenLogprobs, TokenOutput
from tessera.errors import NotFound, TesseraError
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=0)


@dataclass
class Answer:
    """All outputs of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    outputs: list[TokenOutput] = field(default_factory=list)

    @property
    def last(self) -> TokenOutput:
        return self.outputs[-1]

    @property
    def finish_reason(self) -> str | None:
        return self.last.finish_reason

    @property
    def error_code(self) -> str | None:
        return self.last.error[0] if self.last.error else None


class Driver:
    """An engine, and the adapters by ref and bases by id that it can fetch. An error among them is provided
    in place of the adapter or basis; anything unknown is not found."""

    def __init__(
        self,
        engine: Engine,
        adapters: dict[AdapterRef, Adapter] | None = None,
        bases: dict[str, Basis] | None = None,
    ) -> None:
        self.engine = engine
        self.adapters: dict[AdapterRef, Adapter | TesseraError] = dict(adapters or {})
        self.bases: dict[str, Basis | TesseraError] = dict(bases or {})
        self.answers: dict[str, Answer] = {}
        self.num_fetched = 0
        self._ids = itertools.count()

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams = GREEDY,
        adapter: AdapterRef | None = None,
        *,
        tenant: str = "default",
        timeout_s: float | None = None,
        classifies: bool = False,
    ) -> Answer:
        request_id = f"r{next(self._ids)}"
        self.engine.submit(
            GenerationRequest(request_id, tenant, prompt, sampling, adapter, timeout_s, classifies)
        )
        self.answers[request_id] = Answer()
        return self.answers[request_id]

    def id_of(self, answer: Answer) -> str:
        return next(request_id for request_id, other in self.answers.items() if other is answer)

    def fetch(self) -> None:
        """Provide what is missing."""
        for ref in self.engine.missing_adapters():
            self.num_fetched += 1
            self.engine.provide_adapter(
                ref, self.adapters.get(ref, NotFound(f"no {ref}", code="model_not_found"))
            )
        for basis_id in self.engine.missing_bases():
            self.engine.provide_basis(
                basis_id, self.bases.get(basis_id, NotFound("no basis", code="basis_not_found"))
            )

    def step(self) -> list[TokenOutput]:
        outputs = self.engine.step()
        self.engine.check_integrity()
        for output in outputs:
            answer = self.answers[output.request_id]
            assert not answer.outputs or answer.finish_reason is None, "an output after the last one"
            answer.outputs.append(output)
            answer.token_ids += output.token_ids
            answer.logprobs += output.logprobs
        return outputs

    def run(self, max_steps: int = 5000) -> None:
        """Run until the engine has nothing left to do. Every request must have had its last output then."""
        for _ in range(max_steps):
            self.fetch()
            if not self.engine.has_work:
                break
            self.step()
        else:
            raise AssertionError(f"no end after {max_steps} steps: {self.engine.stats()}")
        unfinished = [
            name for name, answer in self.answers.items() if not answer.outputs or not answer.finish_reason
        ]
        assert not unfinished
