"""Which sequences run, and which tokens of theirs the next step computes.

    1. decode     every running sequence with one token to compute, oldest first; if no block is free for it,
                  the newest running sequence is preempted: its blocks go, its tokens and random state stay
    2. prefill    the others that run, in chunks
    3. admission  waiting sequences in the order of their tenants' turns, as far as tokens, blocks, slots go

It never deadlocks: the oldest running sequence is preempted only by its own lack of blocks when it is alone,
and then they suffice, because longer requests are refused at submission. Nobody waits for ever: admission
stops at the first sequence that lacks blocks, and one that has long lacked a slot closes its basis to others.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Iterator

from service.engine.adapters.residency import Residency
from service.engine.adapters.resident_bases import MAX_BLOCKED_PASSES
from service.engine.config import EngineConfig
from service.engine.kv.blocks import BlockPool
from service.engine.scheduling.plan import Chunk, StepBuilder, StepPlan
from service.engine.scheduling.request import PENDING, Sequence
from service.engine.scheduling.waiting_line import WaitingLine
from tessera.errors import EngineOverloaded, TenantOverloaded
from tessera.formats.adapter import AdapterRef

#: While others run, admission leaves this share of the pool for them to grow into, or each admission would
#: soon cost a preemption.
RESERVED_SHARE = 0.01


class Scheduler:
    """Owns the sequences from submission to their end."""

    def __init__(
        self, config: EngineConfig, pool: BlockPool, residency: Residency, *, max_logit_rows: int
    ) -> None:
        self.waiting = WaitingLine(config.tenant_weights)
        self.running: list[Sequence] = []  # oldest first, by order
        self.num_preemptions = self.num_prompt_tokens = self.num_cached_tokens = 0
        self._config = config
        self._pool = pool
        self._residency = residency
        self._max_logit_rows = max_logit_rows
        self._num_passes = 0
        self._full_bases: set[str] = set()  # in this pass
        self._starved: dict[str, Sequence] = {}  # per basis who gets its next slot, before anyone else

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would find something to do."""
        return bool(self.running or self.waiting.num_in_line)

    def check_room(self, tenant: str) -> None:
        """Raises `EngineOverloaded` or `TenantOverloaded` where one request more of the tenant's must not
        wait."""
        if len(self.waiting) >= self._config.max_waiting:
            raise EngineOverloaded(f"{self._config.max_waiting} requests are waiting already")
        if self.waiting.num_waiting(tenant) >= self._config.max_waiting_per_tenant:
            limit = self._config.max_waiting_per_tenant
            raise TenantOverloaded(f"{limit} requests of yours are waiting already, as many as may")

    def submit(self, sequence: Sequence) -> None:
        if sequence.adapter is not None:
            self._residency.enlist(sequence.adapter)
        self.waiting.enter(sequence, parked_for=sequence.adapter)

    def settle(self, ref: AdapterRef) -> None:
        """Let those that are parked for `ref` join their lines if it is ready. Raises `BasisMismatch`."""
        if self._residency.is_ready(ref):
            self.waiting.wake(ref)
        elif self.waiting.parked(ref):
            self._residency.want(ref)  # the other half may have been evicted meanwhile

    def schedule(self) -> StepPlan:
        """Decide on the next step."""
        step = StepBuilder(self._config.max_batch_tokens, self._max_logit_rows)
        prefills, has_preempted = self._schedule_decodes(step)
        self._schedule_prefills(prefills, step)
        if not has_preempted:  # else the victim would come back at once
            self._admit(step)
        self._residency.load()  # now, so that the copies run while the step's tensors are made
        return step.finish()

    def advance(self, plan: StepPlan) -> None:
        """The step is under way: plan the next one as if it was computed, with tokens that are not known yet.
        Sequences that ended meanwhile are left alone."""
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.is_running:
                sequence.num_computed = chunk.end
                if chunk.samples:
                    sequence.token_ids.append(PENDING)

    def commit(self, chunks: Iterable[Chunk]) -> None:
        """The chunks are computed, and their tokens are known: full blocks may be shared from now on."""
        has_cache, block_size = self._config.enable_prefix_cache, self._pool.block_size
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.is_running:  # else preempted meanwhile
                sequence.num_computed = chunk.end
                if has_cache and sequence.may_share and chunk.end // block_size > sequence.num_registered:
                    self._register(sequence, chunk.end // block_size)

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended: free all that it holds."""
        if sequence.is_running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)
        self.waiting.leave(sequence)
        if sequence.adapter is not None:
            if self._starved.get(sequence.adapter.basis_id) is sequence:
                del self._starved[sequence.adapter.basis_id]
            self._residency.dismiss(
                sequence.adapter, pinned_slot=sequence.slot if sequence.is_pinned else None
            )

    def unload(self, tenant: str, adapter_id: str) -> None:
        """Drop every version of an adapter, and its prefix blocks. Requests in flight go on with what they
        have, which they share with nobody any more."""
        owner = (tenant, adapter_id)
        for sequence in (*self.running, *self.waiting):
            if sequence.owner == owner:
                sequence.may_share = False
        self._pool.forget(owner)
        self._residency.unload(tenant, adapter_id)

    def check_integrity(self) -> None:
        self.waiting.check_integrity(Counter(sequence.tenant for sequence in self.running))
        self._residency.check_integrity()
        assert not any(sequence.blocks for sequence in self.waiting)
        self._pool.check_integrity([sequence.blocks for sequence in self.running])
        assert len(self.running) <= self._config.max_running
        orders = [sequence.order for sequence in self.running]
        assert orders == sorted(set(orders))
        assert all(not s.is_pinned and not s.is_running for s in self._starved.values())
        pinned = {(s.basis_id, s.slot) for s in (*self.running, *self.waiting) if s.is_pinned}
        assert sum(table.num_pinned for table in self._residency.bases.tables.values()) == len(pinned)

    def _schedule_decodes(self, step: StepBuilder) -> tuple[list[Sequence], bool]:
        """Returns the running sequences that have more than one token to compute, and whether one was
        preempted."""
        # Every step goes through all that run: no call for one that has its block, nor a property.
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        has_preempted = False
        block_size = self._pool.block_size
        for sequence in list(self.running):
            num_tokens = len(sequence.token_ids)
            if num_tokens - sequence.num_computed != 1:
                prefills.append(sequence)
                continue
            if num_tokens >= sequence.max_length and sequence.awaits_end:
                continue
            if num_tokens > len(sequence.blocks) * block_size:
                while sequence.is_running and not self._grow(sequence, step):
                    self._preempt(self.running[-1])
                    has_preempted = True
            if sequence.is_running:
                decodes.append(sequence)
        step.add_decodes(decodes)
        # not those that an older one has preempted, or that are computed but for the results
        return [s for s in prefills if s.is_running and s.num_uncomputed > 1], has_preempted

    def _schedule_prefills(self, prefills: list[Sequence], step: StepBuilder) -> None:
        for index, sequence in enumerate(prefills):
            if step.num_tokens_left == 0:
                return
            is_alone = index == len(prefills) - 1 and not self.waiting.num_in_line
            step.add_prefill(sequence, is_alone=is_alone)

    def _admit(self, step: StepBuilder) -> None:
        self._num_passes += 1
        self._full_bases.clear()
        closing_basis = self._residency.bases.begin_pass()
        for sequence in self.waiting.in_turn() if self._has_room(step) else ():
            if not self._may_begin(sequence, closing_basis):
                continue
            if not self._begin(sequence, step):
                return
            step.add_prefill(sequence, is_alone=not self.waiting.num_in_line)
            if not self._has_room(step):
                return

    def _has_room(self, step: StepBuilder) -> bool:
        return step.num_tokens_left > 0 and len(self.running) < self._config.max_running

    def _may_begin(self, sequence: Sequence, closing_basis: str | None) -> bool:
        """Whether its adapter is here and has, or now gets, a slot. Parks it if the adapter is gone."""
        ref = sequence.adapter
        if ref is None or sequence.is_pinned:
            return True
        if ref.basis_id in self._full_bases and not self._residency.is_resident(ref):
            self._note_lack_of_slot(sequence, ref.basis_id)  # cheap, for the many that wait for a slot
            return False
        if not self._residency.is_ready(ref):
            self.waiting.park(sequence, ref)
            self._residency.want(ref)
            return False
        if ref.basis_id == closing_basis or self._starved.get(ref.basis_id, sequence) is not sequence:
            return False
        slot = self._residency.pin(ref)
        if slot is None:
            self._full_bases.add(ref.basis_id)
            self._note_lack_of_slot(sequence, ref.basis_id)
            return False
        sequence.slot, sequence.is_pinned = slot, True
        self._starved.pop(ref.basis_id, None)
        return True

    def _note_lack_of_slot(self, sequence: Sequence, basis_id: str) -> None:
        if sequence.blocked_since_pass is None:
            sequence.blocked_since_pass = self._num_passes
        elif self._num_passes - sequence.blocked_since_pass > MAX_BLOCKED_PASSES:
            self._starved[basis_id] = sequence

    def _begin(self, sequence: Sequence, step: StepBuilder) -> bool:
        """Give it its blocks, shared ones first. False, and it stays in line, if they do not suffice."""
        shared = self._pool.match(self._readable_keys(sequence))
        num_new = self._pool.blocks_for(sequence.num_tokens) - len(shared)
        reserve = math.ceil(self._pool.num_blocks * RESERVED_SHARE) if self.running else 0
        blocks = self._pool.acquire(shared, num_new, reserve=reserve)
        if blocks is None:
            return False
        step.fresh_blocks += blocks[len(shared) :]
        sequence.blocks = blocks
        sequence.num_registered = len(shared)
        sequence.num_computed = len(shared) * self._pool.block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
            self.num_prompt_tokens += sequence.num_prompt
            self.num_cached_tokens += sequence.num_computed
        self.waiting.take(sequence)
        bisect.insort(self.running, sequence, key=lambda s: s.order)
        sequence.is_running = True
        return True

    def _readable_keys(self, sequence: Sequence) -> Iterator[bytes]:
        """Prefix keys of the blocks that it may take from the cache. Its last token must be computed, for its
        logits are wanted; for log-probabilities of the prompt all of them must."""
        may_share = self._config.enable_prefix_cache and sequence.may_share
        if may_share and not sequence.needs_prompt_logprobs:
            for index in range((sequence.num_tokens - 1) // self._pool.block_size):
                yield sequence.block_key(index, self._pool.block_size)

    def _grow(self, sequence: Sequence, step: StepBuilder) -> bool:
        """Another block, for its last token. False if none is free."""
        blocks = self._pool.acquire([], 1)
        if blocks is None:
            return False
        sequence.blocks += blocks
        step.fresh_blocks += blocks
        return True

    def _register(self, sequence: Sequence, num_full: int) -> None:
        """Let others share its first `num_full` blocks."""
        for index in range(sequence.num_registered, num_full):
            key = sequence.block_key(index, self._pool.block_size)
            self._pool.register(sequence.blocks[index], key, sequence.owner)
        sequence.num_registered = num_full

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the front of its line; it keeps its slot, and with it the version it began with."""
        self._stop(sequence)
        self.waiting.push_front(sequence)
        self.num_preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.is_running = False
        self._pool.release(sequence.blocks)
        sequence.forget_kv()
