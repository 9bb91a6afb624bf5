"""An engine without a model: the interface of `EngineClient`, the real messages, tokens foretold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from service.engine.wire.messages import (
    Classification,
    EngineInfo,
    EngineStats,
    GenerationRequest,
    TokenLogprobs,
    TokenOutput,
)
from tessera.errors import EngineUnavailable, TesseraError

Script = Callable[[GenerationRequest], list[int]]


def echo(request: GenerationRequest) -> list[int]:
    """The prompt again and again, beginning at its token number `seed`."""
    prompt, start = request.token_ids, request.sampling.seed or 0
    return [prompt[(start + i) % len(prompt)] for i in range(request.sampling.max_tokens)]


def fake_logprob(token_id: int) -> float:
    return -((token_id % 7) + 1) / 10


class FakeEngine:
    """Answers with what `script` says, one token per step.

    refusal: raised by `generate` at once. failure: (code, message) reported after `fail_after` tokens. gate:
    a request goes on only while it is set, but for its first `num_ungated` tokens. tops: the most likely
    tokens beside a chosen one. labels: of every head. cancelled: ids of requests whose reader left before the
    end.
    """

    def __init__(self, *, vocab_size: int = 8192, max_model_len: int = 256) -> None:
        self.is_ready = True
        self.stats: EngineStats | None = EngineStats(memory_bytes={"weights": 1000, "kv": 500})
        self.restarts_total = 0
        self.script: Script = echo
        self.refusal: TesseraError | None = None
        self.failure: tuple[str, str] | None = None
        self.fail_after = 0
        self.num_cached_tokens = 0
        self.tops: dict[int, list[tuple[int, float]]] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_ungated = 0
        self.requests: list[GenerationRequest] = []
        self.running: dict[str, GenerationRequest] = {}
        self.cancelled: list[str] = []
        self.unloaded: list[tuple[str, str]] = []
        self.labels = ["no", "yes"]
        self._info = EngineInfo(
            model_name="tiny",
            model_id="0" * 64,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            device="cpu",
            dtype="float32",
            default_basis_id="b" * 64,
            pid=1,
        )

    @property
    def info(self) -> EngineInfo:
        if not self.is_ready:
            raise EngineUnavailable("the engine is starting at /secret/path")
        return self._info

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def unload(self, tenant: str, adapter_id: str) -> None:
        self.unloaded.append((tenant, adapter_id))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        _ = self.info
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        self.running[request.request_id] = request
        is_finished = False
        try:
            for index, output in enumerate(self._outputs(request)):
                if index >= self.num_ungated:
                    await self.gate.wait()
                await asyncio.sleep(0)
                is_finished = output.finish_reason is not None
                yield output
        finally:
            del self.running[request.request_id]
            if not is_finished:
                self.cancelled.append(request.request_id)

    def _outputs(self, request: GenerationRequest) -> list[TokenOutput]:
        sampling, wanted = request.sampling, self.script(request)
        outputs: list[TokenOutput] = []
        if sampling.max_tokens == 0 and self.failure is None:
            return _ended([self._output(request, [], is_first=True)], "length")
        for token_id in wanted[: sampling.max_tokens]:
            if self.failure is not None and len(outputs) == self.fail_after:
                break
            is_stop = token_id in sampling.stop_token_ids and len(outputs) >= sampling.min_tokens
            is_last = len(outputs) + 1 == sampling.max_tokens
            outputs.append(self._output(request, [token_id], is_first=not outputs))
            if is_stop or is_last:
                return _ended(outputs, "stop" if is_stop else "length")
        if self.failure is not None:
            end = TokenOutput(request.request_id, finish_reason="error", error=self.failure)
            return [*outputs, end]
        return _ended(outputs, "stop")

    def _output(self, request: GenerationRequest, given: list[int], *, is_first: bool) -> TokenOutput:
        sampling = request.sampling
        prompt = None
        if is_first and sampling.prompt_logprobs is not None:
            prompt = [self._logprobs(t, sampling.prompt_logprobs) for t in request.token_ids[1:]]
        return TokenOutput(
            request.request_id,
            token_ids=given,
            logprobs=[]
            if sampling.logprobs is None
            else [self._logprobs(t, sampling.logprobs) for t in given],
            prompt_logprobs=prompt,
            num_cached_tokens=self.num_cached_tokens,
            num_distinct=len({r.adapter for r in self.running.values()}),
            classification=self._classification(request) if request.classifies else None,
        )

    def _classification(self, request: GenerationRequest) -> Classification:
        """Scores that differ between texts: the number of tokens, then ones."""
        scores = [float(len(request.token_ids)), *(1.0 for _ in self.labels[1:])]
        return Classification(scores, self.labels)

    def _logprobs(self, token_id: int, count: int) -> TokenLogprobs:
        logprob = fake_logprob(token_id)
        top = self.tops.get(token_id, [(token_id + i, logprob - i) for i in range(count)])
        return TokenLogprobs(token_id, logprob, top[:count])


def _ended(outputs: list[TokenOutput], reason: str) -> list[TokenOutput]:
    last = outputs[-1]
    return [*outputs[:-1], TokenOutput(**{**vars(last), "finish_reason": reason})]
