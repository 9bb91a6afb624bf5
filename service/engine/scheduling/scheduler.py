"""Decides which requests run, and which of their tokens the next step computes.

    1. decode     every running request with one token to compute, oldest first; if no block is free for it,
                  the newest running request is preempted: it loses its blocks, and keeps its tokens and
                  random state
    2. prefill    the other running requests, in chunks
    3. admission  waiting requests in the order of the fair queue, while there are tokens, blocks and slots

It never deadlocks: the oldest running request could only be preempted when it runs alone and lacks blocks,
and then the pool suffices, because longer requests are refused at submission. No request waits forever:
admission stops at the first request that lacks blocks, and a request that has long lacked a slot closes its
basis to others.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Iterator

from service.engine.adapters.residency import Residency
from service.engine.adapters.resident_bases import MAX_BLOCKED_PASSES
from service.engine.kv.blocks import BlockPool
from service.engine.scheduling.fair_queue import FairQueue
from service.engine.scheduling.plan import Chunk, StepBuilder, StepPlan
from service.engine.scheduling.request import PENDING, EngineRequest
from service.engine.settings import EngineConfig
from tessera.errors import EngineOverloaded, TenantOverloaded
from tessera.formats.adapter_ref import AdapterRef

#: While requests run, admission leaves this share of the pool for them to grow into. Without it each
#: admission would soon cost a preemption.
RESERVED_SHARE = 0.01


class Scheduler:
    """Decides which requests run, and owns what they hold: blocks and pins. `InFlight` owns the requests."""

    def __init__(
        self, config: EngineConfig, pool: BlockPool, residency: Residency, *, max_logit_rows: int
    ) -> None:
        self.waiting = FairQueue(config.tenant_weights)
        self.running: list[EngineRequest] = []  # oldest first
        self.num_preemptions = self.num_prompt_tokens = self.num_cached_tokens = 0
        self._config = config
        self._max_running = config.max_running
        self._pool = pool
        self._residency = residency
        self._max_logit_rows = max_logit_rows
        self._num_passes = 0
        self._full_bases: set[str] = set()  # those without a free slot in this pass
        self._starved: dict[str, EngineRequest] = {}  # by basis, the request that gets its next slot

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would find something to do."""
        return bool(self.running or self.waiting.num_in_line)

    def check_queue_limit(self, tenant: str) -> None:
        """Check that another request of the tenant may wait. Raises `EngineOverloaded` or
        `TenantOverloaded`."""
        if len(self.waiting) >= self._config.max_waiting:
            raise EngineOverloaded(f"{self._config.max_waiting} requests are waiting already (the limit)")
        if self.waiting.num_waiting(tenant) >= self._config.max_waiting_per_tenant:
            limit = self._config.max_waiting_per_tenant
            raise TenantOverloaded(f"this tenant already has {limit} waiting requests (the limit)")

    def enqueue(self, request: EngineRequest) -> None:
        """Let a new request wait for its place, and for its adapter if it has one."""
        if request.adapter is not None:
            self._residency.retain(request.adapter)
        self.waiting.enter(request, parked_for=request.adapter)

    def wake_if_ready(self, ref: AdapterRef) -> None:
        """Let the requests that are parked for `ref` join the queue if it is ready. Raises
        `BasisMismatch`."""
        if self._residency.is_ready(ref):
            self.waiting.wake(ref)
        elif self.waiting.parked(ref):
            self._residency.request(ref)  # of adapter and basis, one may have been evicted meanwhile

    def schedule(self) -> StepPlan:
        """Decide on the next step."""
        step = StepBuilder(self._config.max_batch_tokens, self._max_logit_rows)
        prefills, has_preempted = self._schedule_decodes(step)
        self._schedule_prefills(prefills, step)
        if not has_preempted:  # otherwise the preempted request would come back at once
            self._admit(step)
        self._residency.load()  # now, so that the copies run while the step's tensors are made
        return step.finish()

    def advance(self, plan: StepPlan) -> None:
        """Treat a step that has been started as computed, so that the next one can be planned: its tokens are
        pending. Skips requests that have ended meanwhile."""
        for chunk in plan.chunks:
            request = chunk.request
            if request.is_running:
                request.num_computed = chunk.end
                if chunk.samples:
                    request.token_ids.append(PENDING)

    def commit(self, chunks: Iterable[Chunk]) -> None:
        """Note that the chunks are computed and their tokens known. Full blocks may be shared from now on."""
        has_cache, block_size = self._config.enable_prefix_cache, self._pool.block_size
        for chunk in chunks:
            request = chunk.request
            if request.is_running:  # otherwise it was preempted meanwhile
                request.num_computed = chunk.end
                if has_cache and request.may_share and chunk.end // block_size > request.num_registered:
                    self._register(request, chunk.end // block_size)

    def remove(self, request: EngineRequest) -> None:
        """Free everything that a request holds, because it has ended."""
        if request.is_running:
            self._stop(request)
        else:
            self.waiting.remove(request)
        self.waiting.leave(request)
        if request.adapter is not None:
            if self._starved.get(request.adapter.basis_id) is request:
                del self._starved[request.adapter.basis_id]
            self._residency.release(request.adapter, pinned_slot=request.slot if request.is_pinned else None)

    def unload(self, tenant: str, adapter_id: str) -> None:
        """Drop every version of an adapter, and its prefix blocks. Requests in flight continue with what they
        have, and no longer share it."""
        key = (tenant, adapter_id)
        for request in (*self.running, *self.waiting):
            if request.adapter_key == key:
                request.may_share = False
        self._pool.forget(key)
        self._residency.unload(tenant, adapter_id)

    def check_integrity(self) -> None:
        self.waiting.check_integrity(Counter(request.tenant for request in self.running))
        self._residency.check_integrity()
        assert not any(request.blocks for request in self.waiting)
        self._pool.check_integrity([request.blocks for request in self.running])
        assert len(self.running) <= self._config.max_running
        numbers = [request.number for request in self.running]
        assert numbers == sorted(set(numbers))
        assert all(not request.is_pinned and not request.is_running for request in self._starved.values())
        requests = (*self.running, *self.waiting)
        pinned = {(request.basis_id, request.slot) for request in requests if request.is_pinned}
        assert sum(table.num_pinned for table in self._residency.bases.tables.values()) == len(pinned)

    def _schedule_decodes(self, step: StepBuilder) -> tuple[list[EngineRequest], bool]:
        """Add the decodes. Returns the running requests with more than one token to compute, and whether any
        request was preempted."""
        # Every step goes through all running requests, so one that has its block costs no call and no
        # property.
        decodes: list[EngineRequest] = []
        prefills: list[EngineRequest] = []
        has_preempted = False
        block_size = self._pool.block_size
        for request in list(self.running):
            num_tokens = len(request.token_ids)
            if num_tokens - request.num_computed != 1:
                prefills.append(request)
                continue
            if num_tokens >= request.max_length and request.awaits_end:
                continue
            if num_tokens > len(request.blocks) * block_size:
                while request.is_running and not self._grow(request, step):
                    self._preempt(self.running[-1])
                    has_preempted = True
            if request.is_running:
                decodes.append(request)
        step.add_decodes(decodes)
        # Leave out those that an older one has preempted, and those that only wait for their results.
        prefills = [request for request in prefills if request.is_running and request.num_uncomputed > 1]
        return prefills, has_preempted

    def _schedule_prefills(self, prefills: list[EngineRequest], step: StepBuilder) -> None:
        for index, request in enumerate(prefills):
            if step.num_tokens_left == 0:
                return
            is_alone = index == len(prefills) - 1 and not self.waiting.num_in_line
            step.add_prefill(request, is_alone=is_alone)

    def _admit(self, step: StepBuilder) -> None:
        self._num_passes += 1
        self._full_bases.clear()
        closing_basis = self._residency.bases.begin_pass()
        for request in self.waiting.candidates() if self._has_room(step) else ():
            if not self._try_pin(request, closing_basis):
                continue
            if not self._try_start(request, step):
                return
            step.add_prefill(request, is_alone=not self.waiting.num_in_line)
            if not self._has_room(step):
                return

    def _has_room(self, step: StepBuilder) -> bool:
        return step.num_tokens_left > 0 and len(self.running) < self._max_running

    def _try_pin(self, request: EngineRequest, closing_basis: str | None) -> bool:
        """Pin the request's adapter to a slot. Returns whether it has one; parks the request if the adapter
        is gone."""
        ref = request.adapter
        if ref is None or request.is_pinned:
            return True
        if ref.basis_id in self._full_bases and not self._residency.is_resident(ref):
            self._note_lack_of_slot(request, ref.basis_id)  # cheap, since many may wait for a slot
            return False
        if not self._residency.is_ready(ref):
            self.waiting.park(request, ref)
            self._residency.request(ref)
            return False
        if ref.basis_id == closing_basis or self._starved.get(ref.basis_id, request) is not request:
            return False
        slot = self._residency.pin(ref)
        if slot is None:
            self._full_bases.add(ref.basis_id)
            self._note_lack_of_slot(request, ref.basis_id)
            return False
        request.slot, request.is_pinned = slot, True
        request.head = self._residency.head_of(ref)
        self._starved.pop(ref.basis_id, None)
        return True

    def _note_lack_of_slot(self, request: EngineRequest, basis_id: str) -> None:
        if request.blocked_since_pass is None:
            request.blocked_since_pass = self._num_passes
        elif self._num_passes - request.blocked_since_pass > MAX_BLOCKED_PASSES:
            self._starved[basis_id] = request

    def _try_start(self, request: EngineRequest, step: StepBuilder) -> bool:
        """Run the request with blocks for all its tokens, shared ones first. Returns False, and it keeps its
        place in line, if there are too few."""
        shared = self._pool.match(self._readable_keys(request))
        num_new = self._pool.blocks_for(len(request.token_ids)) - len(shared)
        reserve = math.ceil(self._pool.num_blocks * RESERVED_SHARE) if self.running else 0
        blocks = self._pool.acquire(shared, num_new, reserve=reserve)
        if blocks is None:
            return False
        step.fresh_blocks += blocks[len(shared) :]
        request.blocks = blocks
        request.num_registered = len(shared)
        request.num_computed = len(shared) * self._pool.block_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed
            self.num_prompt_tokens += request.num_prompt
            self.num_cached_tokens += request.num_computed
        self.waiting.start(request)
        bisect.insort(self.running, request, key=lambda r: r.number)
        request.is_running = True
        return True

    def _readable_keys(self, request: EngineRequest) -> Iterator[bytes]:
        """Prefix keys of the blocks that the request may take from the cache. Its last token must be
        computed, because its logits are needed; for log-probabilities of the prompt all tokens must be."""
        may_share = self._config.enable_prefix_cache and request.may_share
        if may_share and not request.needs_prompt_logprobs:
            for index in range((request.num_tokens - 1) // self._pool.block_size):
                yield request.block_key(index, self._pool.block_size)

    def _grow(self, request: EngineRequest, step: StepBuilder) -> bool:
        """Give the request another block for its last token. Returns False if none is free."""
        blocks = self._pool.acquire([], 1)
        if blocks is None:
            return False
        request.blocks += blocks
        step.fresh_blocks += blocks
        return True

    def _register(self, request: EngineRequest, num_full: int) -> None:
        """Let others share the first `num_full` blocks of the request."""
        for index in range(request.num_registered, num_full):
            key = request.block_key(index, self._pool.block_size)
            self._pool.register(request.blocks[index], key, request.adapter_key)
        request.num_registered = num_full

    def _preempt(self, request: EngineRequest) -> None:
        """Put a running request back at the front of its line. It keeps its slot, and with it the version of
        its adapter."""
        self._stop(request)
        self.waiting.push_front(request)
        self.num_preemptions += 1

    def _stop(self, request: EngineRequest) -> None:
        self.running.remove(request)
        request.is_running = False
        self._pool.release(request.blocks)
        request.forget_kv()
