"""The engine: requests in, tokens out, one step at a time.

A synchronous core that runs one base model on one device, by its own layers or by fused ops. It knows no
network, no Redis, no text and no thread: its owner calls `step` while there is work, fetches what is missing
and provides it.
"""

from __future__ import annotations

import itertools
import logging
import os

from service.engine.adapters.packed_adapter import PackedAdapter
from service.engine.adapters.residency import AdapterCache, Residency
from service.engine.adapters.resident_bases import ResidentBases
from service.engine.attention.reference import implementation_of
from service.engine.encoder.runner import EncoderRunner
from service.engine.kv.blocks import BlockPool, root_key
from service.engine.kv.cache import KVShape, PagedKV
from service.engine.kv.memory import add_remainder, module_bytes, num_kv_blocks
from service.engine.sampling.sampler import make_generator
from service.engine.scheduling.request import EngineRequest, RequestLimits
from service.engine.scheduling.scheduler import Scheduler
from service.engine.settings import EngineConfig
from service.engine.step_loop import InFlight, StepLoop
from service.engine.steps.runner import ModelRunner
from service.engine.trial.model_trial import install_and_try
from service.engine.wire.messages import (
    NO_HEAD,
    NOT_GENERATIVE,
    EngineInfo,
    EngineStats,
    GenerationRequest,
    TokenOutput,
)
from tessera.errors import InvalidInput, TesseraError
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from tessera.model.pooling import hidden_width
from tessera.model.rope import pin_rotations

__all__ = ["Engine", "EngineConfig"]

logger = logging.getLogger(__name__)

#: Messages for a request that an adapter was not trained for, by code.
_OTHER_TASK = {
    NO_HEAD: "{} has no classification head; train an adapter with method.type classification, and name that",
    NOT_GENERATIVE: "{} classifies texts and generates none; send its texts to /v1/classify",
}

#: Bounds the memory of the logits of prompt positions in one step, in the model's dtype.
MAX_LOGITS_BYTES = 256 * 1024**2


class Engine:
    """Serves one base model and any number of adapters. Owns the model until `close`.

    Raises `UnsupportedModel` for a model that cannot be served, `InvalidInput` for a configuration that has
    no room for one block.
    """

    def __init__(self, base: BaseModel, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        self._base = base
        self._config = config
        self._attention_before = implementation_of(base.model)
        self._rotations_before = pin_rotations(base.model, base.max_position)
        device, dtype = base.device, base.model.dtype
        self._device = device
        kv_shapes: tuple[KVShape, ...] = ()
        facts, unfit = (None, {}) if base.encoder is not None else install_and_try(base)
        if facts is None:
            # Without a KV cache the blocks only bound how much runs at once; a text is computed as a whole.
            config = config.model_copy(update={"enable_prefix_cache": False})
            max_model_len = min(base.max_position, config.max_batch_tokens)
            num_blocks = config.max_running * -(-max_model_len // config.block_size)
            vocab_size = int(base.model.config.vocab_size)
        else:
            kv_shapes, vocab_size = facts.kv_shapes, facts.vocab_size
            num_blocks = num_kv_blocks(
                kv_shapes, config, max_position=base.max_position, device=device, dtype=dtype
            )
            max_model_len = min(base.max_position, num_blocks * config.block_size)
        self._limits = RequestLimits(vocab_size, max_model_len)
        self._hidden_width = hidden_width(base.model)
        self._weight_bytes = module_bytes(base.model)
        self.kv = PagedKV(
            kv_shapes, num_blocks=num_blocks, block_size=config.block_size, device=device, dtype=dtype
        )
        self.pool = BlockPool(num_blocks, config.block_size)
        self.bases = ResidentBases(base.model, base.model_id, config, device=device, dtype=dtype, unfit=unfit)
        self.residency = Residency(self.bases, AdapterCache(config.host_cache_bytes))
        self.scheduler = Scheduler(
            config,
            self.pool,
            self.residency,
            max_logit_rows=max(1, MAX_LOGITS_BYTES // (vocab_size * dtype.itemsize)),
        )
        self.runner: ModelRunner | EncoderRunner
        if facts is None:
            self.runner = EncoderRunner(base.model, self.bases, config)
        else:
            self.runner = ModelRunner(
                base.model, facts, self.kv, self.bases, config, max_model_len=max_model_len
            )
        self._in_flight = InFlight(self.scheduler)
        self._numbers = itertools.count()
        self._looks_ahead = config.lookahead == "on" or (config.lookahead == "auto" and device.type == "cuda")
        self.loop = StepLoop(self.scheduler, self.runner, self._in_flight)

    def step(self) -> list[TokenOutput]:
        """Run one iteration: decode, prefill and admit as much as fits. Return the outputs that became ready.

        Raises only an accelerator's own errors, after which the process cannot serve any more.
        """
        self._in_flight.expire()
        plan = self.scheduler.schedule()
        started = self.loop.start(plan)
        self.loop.finish_previous()  # while the device works on the step that was started
        if started is not None:
            if self._looks_ahead and started.can_wait:
                self.loop.finish_later(started)
            else:
                self.loop.finish(started)
        return self._in_flight.take_outputs()

    @property
    def has_missing(self) -> bool:
        """Whether `missing_adapters` or `missing_bases` would return something."""
        return self.residency.has_missing

    @property
    def has_work(self) -> bool:
        """Whether `step`, or fetching what is missing, would make progress. A request that waits for an
        adapter being fetched is no work until its deadline has passed, so ask at least once a second."""
        return (
            self._in_flight.has_news
            or self.loop.unfinished is not None
            or self.scheduler.has_work
            or self.residency.has_missing
        )

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises `InvalidInput`, `EngineOverloaded` or `TenantOverloaded` if it is
        refused."""
        self._limits.check(request)
        if self._base.encoder is not None and not request.classifies:
            message = _OTHER_TASK[NOT_GENERATIVE].format("the base model, an encoder,")
            raise InvalidInput(message, param="model", code=NOT_GENERATIVE)
        if request.classifies and request.adapter is None:
            message = _OTHER_TASK[NO_HEAD].format("the base model")
            raise InvalidInput(message, param="model", code=NO_HEAD)
        if request.request_id in self._in_flight:
            raise InvalidInput(f"request {request.request_id} is in flight already", param="request_id")
        self.scheduler.check_queue_limit(request.tenant)
        ref = request.adapter
        if ref is not None and not self.bases.can_ever_hold(ref.basis_id):
            raise InvalidInput(
                f"the basis of adapter {ref.adapter_id} is not resident and cannot become so: all "
                f"{self._config.max_resident_bases} places are taken permanently",
                param="model",
                code="basis_not_resident",
            )
        engine_request = EngineRequest(
            request,
            number=next(self._numbers),
            root_key=root_key(self._base.model_id, request.tenant, ref),
            generator=make_generator(request.sampling, self._device),
        )
        self._in_flight.add(engine_request)
        self.scheduler.enqueue(engine_request)
        if ref is not None:
            self._wake_or_fail(ref)

    def cancel(self, request_id: str) -> None:
        """End a request; its last output is "cancelled". Does nothing if it has ended already."""
        self._in_flight.cancel(request_id)

    def missing_adapters(self) -> list[AdapterRef]:
        """Return the adapters that requests wait for and that have not been returned here before."""
        return self.residency.take_missing()

    def missing_bases(self) -> list[str]:
        """Return the bases that requests wait for, that have a place, and that have not been returned here
        before."""
        return self.bases.take_missing()

    def holds(self, ref: AdapterRef) -> bool:
        """Whether an adapter is here already. Any thread may ask; the answer may be outdated
        (`Residency.holds`)."""
        return self.residency.holds(ref)

    def provide_adapter(self, ref: AdapterRef, adapter: Adapter | PackedAdapter | TesseraError) -> None:
        """Provide an adapter that was missing, or the error that fails the requests that wait for it."""
        try:
            self.residency.provide(ref, adapter)
        except TesseraError as error:
            self._fail_parked(ref, error)
        else:
            self._wake_or_fail(ref)

    def provide_basis(self, basis_id: str, basis: Basis | TesseraError) -> None:
        """Provide a basis that was missing, or the error that fails the requests that wait for it."""
        waiting = self.scheduler.waiting.parked_refs(basis_id)
        try:
            self.bases.provide(basis_id, basis)
        except TesseraError as error:
            for ref in waiting:
                self._fail_parked(ref, error)
        else:
            for ref in waiting:
                self._wake_or_fail(ref)

    def add_basis(self, basis: Basis) -> None:
        """Make a basis resident permanently. Raises `BasisMismatch`, or `InvalidInput` if there is no
        place."""
        self.bases.add(basis, is_permanent=True)
        self.runner.prepare()

    def unload(self, tenant: str, adapter_id: str) -> None:
        """Drop every version of an adapter, so that later requests find nothing of it: host copies, idle
        slots and prefix blocks now, slots and blocks in use when their requests have ended."""
        self.scheduler.unload(tenant, adapter_id)

    def close(self) -> None:
        """Restore the model as it was. The engine cannot be used any more."""
        self.runner.close()
        self.bases.close()
        self._base.model.set_attn_implementation(self._attention_before)
        pin_rotations(self._base.model, self._rotations_before)

    def info(self) -> EngineInfo:
        """Return the facts about the engine that do not change."""
        return EngineInfo(
            model_name=self._base.name,
            model_id=self._base.model_id,
            vocab_size=self._limits.vocab_size,
            max_model_len=self._limits.max_model_len,
            device=str(self._device),
            dtype=str(self._base.model.dtype).removeprefix("torch."),
            default_basis_id=self.bases.default_id,
            forward_mode=self.runner.forward_mode,
            pid=os.getpid(),
        )

    def stats(self) -> EngineStats:
        """Return a snapshot of the gauges and counters."""
        scheduler, pool, bases, cache = self.scheduler, self.pool, self.bases, self.residency.cache
        tables = list(bases.tables.values())
        used = {
            "weights": self._weight_bytes,
            "kv": self.kv.nbytes,
            "adapters": sum(table.nbytes for table in tables),
            "bases": bases.factor_bytes,
        }
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_waiting_for_adapter=scheduler.waiting.num_parked,
            kv_blocks=pool.num_blocks,
            kv_blocks_used=pool.num_used,
            kv_blocks_cached=pool.num_cached,
            slots=sum(table.num_slots for table in tables),
            slots_resident=sum(table.num_resident for table in tables),
            slots_pinned=sum(table.num_pinned for table in tables),
            host_cache_bytes=cache.num_bytes,
            host_cache_entries=len(cache),
            resident_bases=len(bases),
            memory_bytes=add_remainder(used, self._device),
            steps_total=self.loop.num_steps,
            prompt_tokens_total=scheduler.num_prompt_tokens,
            generation_tokens_total=self._in_flight.num_generated,
            cached_prompt_tokens_total=scheduler.num_cached_tokens,
            preemptions_total=scheduler.num_preemptions,
            adapter_loads_total={"cached": cache.num_loads, "resident": bases.num_slot_loads},
            adapter_load_failures_total=self.residency.num_load_failures,
            adapter_evictions_total={"cached": cache.num_evictions, "resident": bases.num_slot_evictions},
            step_failures_total=self.loop.num_failed,
        )

    def check_integrity(self) -> None:
        """Assert that every block, slot and request has exactly one owner, and that all are accounted for."""
        self.scheduler.check_integrity()
        self._in_flight.check_integrity()

    def _wake_or_fail(self, ref: AdapterRef) -> None:
        """Wake the requests that wait for an adapter if it and its basis have arrived. Those that want of it
        what it was not trained for fail."""
        try:
            if self.residency.is_ready(ref):
                self._fail_other_tasks(ref)
            self.scheduler.wake_if_ready(ref)
        except TesseraError as error:
            self._fail_parked(ref, error)

    def _fail_other_tasks(self, ref: AdapterRef) -> None:
        """Fail the requests that classify with an adapter without a head, or generate with one that has a
        head."""
        head = self.residency.head_of(ref)
        for request in self.scheduler.waiting.parked(ref):
            if request.classifies != (head is not None):
                code = NO_HEAD if request.classifies else NOT_GENERATIVE
                self._in_flight.fail(request, code, _OTHER_TASK[code].format(ref.adapter_id))
            elif head is not None and head.width != self._hidden_width:
                message = f"the head of adapter {ref.adapter_id} reads {head.width} numbers, not "
                self._in_flight.fail(request, "basis_mismatch", f"{message}{self._hidden_width}")

    def _fail_parked(self, ref: AdapterRef, error: TesseraError) -> None:
        for request in self.scheduler.waiting.parked(ref):
            self._in_flight.fail(request, error.code, error.message)
