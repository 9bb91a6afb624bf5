"""The lock on the base model: for one training step, or for a task that needs the model for itself.

Such tasks build a basis or find an initialization. They run passes through the model with hooks of their
own, so no training step may run meanwhile. They take seconds to minutes, so they run in a thread and can be
stopped between two modules or batches; the lock is released only after they have ended. This module knows
neither what is built nor for whom.
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

#: Messages of torch's CPU allocator, which has no exception class of its own.
_CPU_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")


class _Interrupted(Exception):
    """The caller was cancelled, so the work must stop."""


class ModelLock(asyncio.Lock):
    """Held by whoever uses the base model: by training for each step, by `run` for a whole task."""

    def __init__(self, base: BaseModel) -> None:
        super().__init__()
        self._base = base

    async def run(self, work: Callable[[Progress], T], *, modules: Sequence[str], on_progress: Progress) -> T:
        """Run `work(progress)` in a thread while holding the lock, and return its result.

        on_progress is called in the event loop. modules: names in the order of the work, for error messages.
        When the caller is cancelled, the work stops after the current module or batch, and the lock is held
        until then. Raises what the work raises, and `TesseraError` (out_of_memory) naming the module.
        """
        loop, stop = asyncio.get_running_loop(), threading.Event()

        def forward_progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(on_progress, done, total)

        async with self:
            exclusive = ExclusiveTask(self._base, work, modules, forward_progress, stop)
            task = asyncio.create_task(asyncio.to_thread(exclusive.run))
            try:
                return await asyncio.shield(task)
            finally:
                stop.set()
                while not task.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait({task})
                task.exception()  # marks it as retrieved: after a cancellation nobody else does


class ExclusiveTask:
    """One task that has the model for itself, in a thread of its own."""

    def __init__(
        self,
        base: BaseModel,
        work: Callable[[Progress], Any],
        modules: Sequence[str],
        on_progress: Progress,
        stop: threading.Event,
    ) -> None:
        self._base, self._work, self._modules = base, work, modules
        self._on_progress, self._stop = on_progress, stop
        self._num_done = 0

    def run(self) -> Any:
        """Do the work with the model and return its result.

        Raises `_Interrupted` once the caller has asked it to stop, `TesseraError` (out_of_memory).
        """
        model = self._base.model
        hook = model.register_forward_pre_hook(lambda module, args: self._raise_if_stopped())
        try:
            self._raise_if_stopped()
            return self._work(self._report)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            message = self._describe(error)
            traceback.clear_frames(error.__traceback__)  # the frames hold the tensors
        finally:
            hook.remove()
            if self._base.device.type == "cuda":
                torch.cuda.empty_cache()
        raise TesseraError(message, code="out_of_memory")

    def _report(self, done: int, total: int) -> None:
        self._num_done = done
        self._raise_if_stopped()
        self._on_progress(done, total)

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise _Interrupted

    def _describe(self, error: BaseException) -> str:
        names = self._modules
        where = names[self._num_done] if self._num_done < len(names) else "the last steps"
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return f"out of memory at {where} ({self._num_done} of {len(names)} modules done): {first_line}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that a device or the host ran out of memory. Other jobs may continue then."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_OUT_OF_MEMORY)
