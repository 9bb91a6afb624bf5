"""The outputs of one request on their way from the socket to one reader, who may be slow.

Knows nothing of sockets or the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from adapter_core.errors import TesseraError
from service.engine.messages import TokenOutput


class OutputStream:
    """A queue of outputs that ends with the first finish_reason or error."""

    def __init__(self) -> None:
        self.is_finished = False
        self._pending: list[TokenOutput] = []
        self._error: TesseraError | None = None
        self._changed = asyncio.Event()

    def put(self, output: TokenOutput) -> None:
        if self.is_finished:
            return
        self.is_finished = output.finish_reason is not None
        self._pending.append(output)
        self._changed.set()

    def fail(self, error: TesseraError) -> None:
        if self.is_finished:
            return
        self.is_finished = True
        self._error = error
        self._changed.set()

    async def next(self) -> TokenOutput:
        """All that has come since the last call, as one output; waits for it. Raises what `fail` got."""
        await self._changed.wait()
        self._changed.clear()
        if self._pending:
            outputs, self._pending = self._pending, []
            if self._error is not None:
                self._changed.set()
            return merge_outputs(outputs)
        assert self._error is not None
        raise self._error


def merge_outputs(outputs: Sequence[TokenOutput]) -> TokenOutput:
    """Several outputs of one request, in order, as one: what a slow reader gets."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    prompts = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    return TokenOutput(
        last.request_id,
        [token for output in outputs for token in output.token_ids],
        [entry for output in outputs for entry in output.logprobs],
        prompts[0] if prompts else None,
        last.finish_reason,
        last.error,
        max(output.num_cached_tokens for output in outputs),
        max(output.num_distinct for output in outputs),
    )
