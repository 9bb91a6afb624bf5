"""The interface of an engine for the HTTP side, which tests implement with a fake.

`engine_client.py` and `attachment.py` implement it with the engine process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from service.engine.wire.messages import EngineInfo, EngineStats, GenerationRequest, TokenOutput


class TokenEngine(Protocol):
    """Token ids in, token ids out."""

    @property
    def info(self) -> EngineInfo:
        """The model, device and limits of the engine. Raises `EngineUnavailable` until it is ready."""

    @property
    def stats(self) -> EngineStats | None:
        """The latest statistics; None before the first."""

    @property
    def is_ready(self) -> bool: ...

    @property
    def restarts_total(self) -> int: ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput, None]:
        """Yield the outputs of one request; the last has a finish_reason. Closing the iterator cancels the
        request.

        Raises `EngineUnavailable` if there is no engine, or it dies meanwhile.
        """

    async def unload(self, tenant: str, adapter_id: str) -> None: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...
