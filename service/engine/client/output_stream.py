"""The outputs of one request on their way from the socket to one reader, who may be slow.

Knows nothing of sockets or the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from service.engine.wire.messages import TokenOutput
from tessera.errors import TesseraError

#: Outputs of one slow reader that are kept apart; beyond them they are put together, which is far smaller.
MAX_APART = 32
#: What Python objects take: a token id in a list, an entry of log-probabilities, one alternative in it.
_TOKEN_BYTES, _ENTRY_BYTES, _ALTERNATIVE_BYTES = 40, 150, 120


class Backlog:
    """About how much memory takes what the readers of all streams of a process have not fetched."""

    num_bytes = 0


class OutputStream:
    """A queue of outputs that ends with the first finish_reason or error.

    backlog: where it counts what waits here, beside other streams. num_bytes: its own part of that.
    """

    def __init__(self, backlog: Backlog | None = None) -> None:
        self.is_finished = False
        self.num_bytes = 0
        self._backlog = backlog or Backlog()
        self._pending: list[TokenOutput] = []
        self._error: TesseraError | None = None
        self._changed = asyncio.Event()

    def put(self, output: TokenOutput) -> None:
        if self.is_finished:
            return
        self.is_finished = output.finish_reason is not None
        size = _size(output)
        self.num_bytes += size
        self._backlog.num_bytes += size
        if len(self._pending) < MAX_APART:
            self._pending.append(output)
        else:
            _append(self._pending[-1], output)
        self._changed.set()

    def fail(self, error: TesseraError) -> None:
        if self.is_finished:
            return
        self.is_finished = True
        self._error = error
        self._changed.set()

    def cut(self, error: TesseraError) -> None:
        """End it with `error`, whatever the reader has not fetched."""
        self.drop()
        self.is_finished, self._error = True, error
        self._changed.set()

    def drop(self) -> None:
        """Forget what the reader has not fetched."""
        self._take()

    async def next(self) -> TokenOutput:
        """All that has come since the last call, as one output; waits for it. Raises what `fail` got."""
        await self._changed.wait()
        self._changed.clear()
        if self._pending:
            outputs = self._take()
            if self._error is not None:
                self._changed.set()
            return merge_outputs(outputs)
        assert self._error is not None
        raise self._error

    def _take(self) -> list[TokenOutput]:
        self._backlog.num_bytes -= self.num_bytes
        outputs, self._pending, self.num_bytes = self._pending, [], 0
        return outputs


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


def _append(output: TokenOutput, later: TokenOutput) -> None:
    """Make `output`, which nobody else has, the two of them."""
    output.token_ids += later.token_ids
    output.logprobs += later.logprobs
    output.prompt_logprobs = output.prompt_logprobs or later.prompt_logprobs
    output.finish_reason, output.error = later.finish_reason, later.error
    output.num_cached_tokens = max(output.num_cached_tokens, later.num_cached_tokens)
    output.num_distinct = max(output.num_distinct, later.num_distinct)


def _size(output: TokenOutput) -> int:
    entries = output.logprobs if output.prompt_logprobs is None else output.logprobs + output.prompt_logprobs
    num_alternatives = sum(len(entry.top) for entry in entries) if entries else 0
    return (
        _TOKEN_BYTES * len(output.token_ids)
        + _ENTRY_BYTES * len(entries)
        + _ALTERNATIVE_BYTES * num_alternatives
    )
