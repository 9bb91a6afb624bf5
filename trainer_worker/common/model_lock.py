"""The base model for one piece of work at a time: building a basis, or finding a start.

That work runs passes through the model with hooks of its own, so no training step may run meanwhile; and it
takes seconds to minutes, so it runs in a thread, can be stopped between two modules or batches, and has ended
before anybody else gets the model. Knows neither what is built nor for whom.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from tessera.errors import TesseraError
from tessera.model.base_model import BaseModel

T = TypeVar("T")

#: progress(done, total), called after each module.
Progress = Callable[[int, int], None]

#: What torch's CPU allocator says; it has no exception of its own.
_CPU_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")


class _Interrupted(Exception):
    """Whoever waited for the work does not want it any more."""


class SoleUse:
    """Runs work that needs the model for itself. quiet: held meanwhile; training holds it for each step."""

    def __init__(self, base: BaseModel, quiet: asyncio.Lock) -> None:
        self._base, self._quiet = base, quiet

    async def run(self, work: Callable[[Progress], T], *, modules: Sequence[str], on_progress: Progress) -> T:
        """The result of `work(progress)`, made in a thread. on_progress is called in the event loop.

        modules: names in the order of the work, for errors. When the caller is cancelled, the work ends after
        the module or the batch at hand, and only then does this. Raises what the work raises, and
        `TesseraError` (out_of_memory) naming the module.
        """
        loop, stop = asyncio.get_running_loop(), threading.Event()

        def tell(done: int, total: int) -> None:
            loop.call_soon_threadsafe(on_progress, done, total)

        async with self._quiet:
            job = _Piece(self._base, work, modules, tell, stop)
            task = asyncio.create_task(asyncio.to_thread(job.run))
            try:
                return await asyncio.shield(task)
            finally:
                stop.set()
                while not task.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait({task})
                task.exception()  # if it was interrupted, nobody else asks


class _Piece:
    """One piece of work, in its thread."""

    def __init__(
        self,
        base: BaseModel,
        work: Callable[[Progress], Any],
        modules: Sequence[str],
        tell: Progress,
        stop: threading.Event,
    ) -> None:
        self._base, self._work, self._modules = base, work, modules
        self._tell, self._stop = tell, stop
        self._num_done = 0

    def run(self) -> Any:
        model = self._base.model
        hook = model.register_forward_pre_hook(lambda module, args: self._check())
        try:
            self._check()
            return self._work(self._progress)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            message = self._told(error)
            traceback.clear_frames(error.__traceback__)  # they hold the tensors
        finally:
            hook.remove()
            if self._base.device.type == "cuda":
                torch.cuda.empty_cache()
        raise TesseraError(message, code="out_of_memory")

    def _progress(self, done: int, total: int) -> None:
        self._num_done = done
        self._check()
        self._tell(done, total)

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Interrupted

    def _told(self, error: BaseException) -> str:
        names = self._modules
        where = names[self._num_done] if self._num_done < len(names) else "the last steps"
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return f"out of memory at {where} ({self._num_done} of {len(names)} modules done): {said}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; other jobs may go on then."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_OUT_OF_MEMORY)
