"""The engine process: starts the engine, serves it at a unix socket, and ends with its parent.

    main thread    asyncio: socket, store, signals
    engine thread  runs the engine (`engine_thread.py`)

It listens before it can serve, so that the API can report why it is not ready. An error that the engine does
not survive (a CUDA error, out of memory) ends the process with a non-zero status, and the API's side starts
another.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from service.engine.engine import Engine
from service.engine.process.adapter_fetcher import AdapterFetcher, StoreReader
from service.engine.process.engine_thread import EngineThread
from service.engine.process.server import EngineServer
from service.engine.settings import EngineConfig, EngineSettings
from tessera.errors import EngineUnavailable, InvalidInput, TesseraError, Unavailable
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel, load_base_model
from tessera.redis.client import connect
from tessera.settings import CommonSettings
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore, ensure_basis

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED = 0, 1

#: Seconds between two checks that the parent is alive. The kernel signals its death at once; this catches the
#: cases that the kernel misses (another system, a lost race).
PARENT_CHECK_S = 1.0
#: How long the running step may take once the process has been asked to end.
STOP_TIMEOUT_S = 3.0
FLUSH_TIMEOUT_S = 1.0
#: Seconds between two attempts to reach the store at start: the first, and the most.
_FIRST_STORE_DELAY_S, _MAX_STORE_DELAY_S = 0.2, 5.0


class EngineProcess:
    """One run of the engine process. `run` returns its exit status.

    restarts: number of earlier runs. build: makes the engine, on a thread of its own.
    """

    def __init__(
        self,
        settings: CommonSettings,
        engine_settings: EngineSettings,
        *,
        restarts: int = 0,
        build: Callable[[BaseModel, Basis, EngineConfig], Engine] | None = None,
    ) -> None:
        url = settings.store_url_with_password()
        if url is None:
            raise InvalidInput("the engine process needs the URL of a store", param="TESSERA_STORE_URL")
        self._settings = settings
        self._engine_settings = engine_settings
        self._restarts = restarts
        self._build = build or build_engine
        redis = connect(url, timeout_s=settings.store_timeout_s)
        self._adapters = AdapterStore(redis)
        self._bases = BasisStore(redis, cache_dir=settings.data_dir / "cache" / "bases")
        self._server = EngineServer()
        self._thread: EngineThread | None = None
        self._exit_status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, socket: Path, *, parent: int) -> int:
        """Serve at `socket` until SIGTERM, the death of process `parent`, or a failure."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._end, EXIT_OK)
        await self._server.listen(socket)
        for task in (self._start(), self._server.keep_beating(), self._watch(parent)):
            self._spawn(task)
        status = await self._exit_status
        logger.info("engine process %d ends with status %d", os.getpid(), status)
        await self._server.flush(timeout_s=FLUSH_TIMEOUT_S)
        await self._server.close()
        if self._thread is not None and status == EXIT_OK:
            await asyncio.to_thread(self._thread.stop, timeout_s=STOP_TIMEOUT_S)
        return status

    async def _start(self) -> None:
        """Load the model, the default basis and the engine, then announce that it is ready. An error
        that waiting cannot fix ends the process."""
        try:
            self._server.announce_starting("the engine is loading the base model")
            base = await asyncio.to_thread(_load, self._settings, self._engine_settings)
            self._server.announce_starting("the engine is preparing the default basis")
            basis = await self._default_basis(base)
            kinds = dict.fromkeys(module.name.split(".")[-1] for module in basis.manifest.modules)
            logger.info("the default basis adapts %d linear layers: %s", basis.num_modules, ", ".join(kinds))
            engine = await asyncio.to_thread(self._build, base, basis, self._engine_settings)
        except Exception as error:
            self._fail(error)
            return
        self._thread = EngineThread(engine, on_delivery=self._server.deliver, on_failure=self._fail)
        reader = StoreReader(self._adapters, self._bases, engine.bases.slot_format)
        info = replace(engine.info(), restarts=self._restarts)
        num_threads = self._engine_settings.threads or torch.get_num_threads()
        self._thread.post(partial(_bind_thread, device=base.device, num_threads=num_threads))
        # This thread verifies adapters: one of 57,000 numbers takes 0.24 ms at p90, with 32 threads 3.8 ms.
        torch.set_num_threads(1)
        self._thread.start()
        self._server.announce_ready(info, self._thread, AdapterFetcher(reader, self._thread))
        logger.info("engine process %d serves %s on %s", os.getpid(), info.model_name, info.device)

    async def _default_basis(self, base: BaseModel) -> Basis:
        """Return the default basis from the store, building it if it is not there. Waits for the store as
        long as needed."""
        delay_s = _FIRST_STORE_DELAY_S
        while True:
            try:
                return await ensure_basis(
                    self._bases,
                    base,
                    method=self._settings.method,
                    rank=self._settings.rank,
                    target_modules=self._settings.target_modules,
                )
            except Unavailable as error:
                logger.warning("the default basis is not available yet: %s", error)
                self._server.announce_starting(f"the engine waits for the store: {error}")
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_STORE_DELAY_S)

    def _fail(self, error: BaseException) -> None:
        """Report to the API why the process fails, and end it."""
        if isinstance(error, TesseraError):
            logger.critical("the engine process fails: %s", error)
        else:
            logger.critical("the engine process fails: %r", error, exc_info=error)
            error = EngineUnavailable(f"the engine failed: {error!r}")
        self._server.announce_failure(error)
        self._end(EXIT_FAILED)

    async def _watch(self, parent: int) -> None:
        while os.getppid() == parent:  # noqa: ASYNC110 - nothing signals the end of another process
            await asyncio.sleep(PARENT_CHECK_S)
        logger.warning("process %d, which started the engine, is gone", parent)
        self._end(EXIT_OK)

    def _end(self, status: int) -> None:
        if not self._exit_status.done():
            self._exit_status.set_result(status)

    def _spawn(self, task: Coroutine[Any, Any, None]) -> None:
        running = asyncio.create_task(task)
        self._tasks.add(running)  # the event loop itself keeps only weak references
        running.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)


def _bind_thread(_: Engine, *, device: torch.device, num_threads: int) -> None:
    """Set what torch keeps per thread: the current CUDA device, and the number of threads of one
    operation."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(num_threads)


def _load(settings: CommonSettings, engine_settings: EngineSettings) -> BaseModel:
    if engine_settings.threads is not None:
        torch.set_num_threads(engine_settings.threads)
    return load_base_model(
        settings.base_model,
        revision=settings.base_model_revision,
        device=settings.device,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
    )


def build_engine(base: BaseModel, basis: Basis, config: EngineConfig) -> Engine:
    """Build an engine with `basis` resident permanently, and its graphs captured.

    Freezes the objects that exist now: a collection of all garbage would otherwise go through 360,000 objects
    of the libraries, which takes 0.16 s.
    """
    if base.device.type == "cuda":  # the first allocation page-locks what `engine_child.py` reserves
        torch.empty(1, pin_memory=True)
    engine = Engine(base, config)
    engine.add_basis(basis)
    engine.runner.warm_up()
    gc.collect()
    gc.freeze()
    return engine
