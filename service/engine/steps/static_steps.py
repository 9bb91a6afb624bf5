"""Steps over static tensors, which a CUDA graph can replay, so that the host launches one graph and not 300
ops.

    upload     one copy: the integers of the step, padded to one of few shapes (`shapes.py`)
    compute    from the integers to logits, most likely tokens and finiteness: captured once per shape

Serves steps that decode, steps with pieces of prompts, and both together. On other devices than CUDA, and the
first time in each shape, `compute` simply runs. Works with the fused path only: what the generic path does
between its ops cannot be captured here.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.engine.adapters.slots import SlotTable
from service.engine.attention.reference import TokenRows
from service.engine.forward.layers import FusedModel
from service.engine.kv.cache import PagedKV
from service.engine.kv.memory import upload
from service.engine.sampling.sampler import finite_rows
from service.engine.scheduling.plan import StepPlan
from service.engine.steps.batch import TokenSources
from service.engine.steps.results import StepLogits
from service.engine.steps.shapes import ShapeLimits, StepShape, lay_out, pieces
from service.engine.steps.step_attention import StepAttention

logger = logging.getLogger(__name__)


@dataclass
class _Bucket:
    """The static tensors of one shape."""

    #: int64 [shape.num_integers], see `shapes.py`.
    integers: Tensor
    graph: torch.cuda.CUDAGraph | None = None
    #: Where the graph leaves its results.
    outputs: StepLogits | None = None


class StaticSteps:
    """Steps of `model`. max_sequences, max_tokens: of one step. Logits are valid until the next step."""

    def __init__(
        self,
        model: FusedModel,
        kv: PagedKV,
        attention: StepAttention,
        *,
        max_sequences: int,
        max_tokens: int,
    ) -> None:
        #: Number of times that a graph was replayed.
        self.num_replays = 0
        self._model = model
        self._kv = kv
        self._attention = attention
        self._limits = ShapeLimits(max_sequences, max_tokens, attention.queries_per_tile)
        self._device = kv.pages_of(0)[0].device
        self._logits = torch.empty(max_sequences, model.vocab_size, device=self._device, dtype=kv.dtype)
        self._can_capture = self._device.type == "cuda"
        self._pool: Any = torch.cuda.graph_pool_handle() if self._can_capture else None
        self._buckets: dict[StepShape, _Bucket] = {}
        self._last: StepShape | None = None

    @property
    def shapes(self) -> list[StepShape]:
        """The shapes that steps have had so far."""
        return list(self._buckets)

    @property
    def captured(self) -> list[StepShape]:
        """The shapes that have a graph."""
        return [shape for shape, bucket in self._buckets.items() if bucket.graph is not None]

    def can_run(self, plan: StepPlan, basis_id: str) -> bool:
        """Whether a step can run over static tensors: it scores and classifies no prompt, has no adapters but
        those of the fused basis, and is so small that the host's time matters. basis_id: of the fused
        basis."""
        if not plan.basis_ids <= {None, basis_id}:
            return False
        return plan.is_decode or (
            plan.num_tokens <= self._limits.max_mixed
            and not any(chunk.prompt_positions for chunk in plan.chunks)
            and not plan.classifying
        )

    def launch(self, plan: StepPlan, slots: SlotTable | None, sources: TokenSources | None) -> StepLogits:
        """Start a step that `can_run` accepts. slots: of the fused basis. sources: of the pending tokens."""
        tables = self._attention.block_tables
        table_rows, entries = tables.plan([chunk.request.blocks for chunk in plan.chunks])
        shape = self._shape_of(plan)
        integers = lay_out(plan, table_rows, shape, self._limits.queries_per_tile)
        arrays = [integers, entries, np.asarray(plan.fresh_blocks, np.int64)]
        if sources is not None:
            arrays.append(sources.rows)
        uploaded, new_entries, fresh_blocks, *source_rows = upload(arrays, self._device)
        tables.write(new_entries)
        if plan.fresh_blocks:
            self._kv.clear(fresh_blocks)
        bucket = self._bucket(shape)
        bucket.integers.copy_(uploaded)
        rows, *_ = pieces(bucket.integers, shape)
        if sources is not None:
            input_ids = rows[0, : len(sources.rows)]
            input_ids.copy_(sources.fill_in(input_ids, source_rows[0]))
        if slots is not None:
            slots.stage(rows[3])
        outputs = self._run(shape)
        count = sum([chunk.samples for chunk in plan.chunks])
        assert outputs.greedy is not None
        assert outputs.is_finite is not None
        return StepLogits(outputs.logits[:count], outputs.greedy[:count], outputs.is_finite[:count])

    def warm_up(self, slots: SlotTable | None) -> None:
        """Run every shape on padding only, so that kernels are compiled and graphs captured now, and not when
        a request needs them. If memory runs out, the remaining shapes are left to their first use. slots: of
        the fused basis."""
        began, free = time.perf_counter(), _free_bytes(self._device)
        for (
            shape
        ) in self._limits.shapes():  # large ones first, because the others can then share their memory
            rows, *_ = pieces(self._bucket(shape).integers.zero_(), shape)
            if slots is not None:
                slots.stage(rows[3])
            try:
                self._run(shape)
            except torch.OutOfMemoryError:
                logger.warning("out of memory; the remaining shapes of steps are captured on first use")
                break
        seconds, held = time.perf_counter() - began, free - _free_bytes(self._device)
        logger.info("%d graphs captured in %.1f s, %d MB", len(self.captured), seconds, held // 1_000_000)

    @property
    def can_repeat(self) -> bool:
        return self._last is not None

    def repeat(self) -> None:
        """Repeat the computation of the last step over the same tensors, for measurements."""
        assert self._last is not None
        with torch.inference_mode():
            self._run(self._last)

    def _shape_of(self, plan: StepPlan) -> StepShape:
        can_split = self._attention.can_split(plan.chunks)
        if plan.is_decode:
            return self._limits.decode_shape(len(plan.chunks), can_split=can_split)
        return self._limits.mixed_shape(plan.num_tokens, can_split=can_split)

    def _bucket(self, shape: StepShape) -> _Bucket:
        if shape not in self._buckets:
            integers = torch.zeros(shape.num_integers, dtype=torch.int64, device=self._device)
            self._buckets[shape] = _Bucket(integers)
        return self._buckets[shape]

    def _run(self, shape: StepShape) -> StepLogits:
        self._last = shape
        bucket = self._buckets[shape]
        if bucket.graph is not None and bucket.outputs is not None:
            bucket.graph.replay()
            self.num_replays += 1
            return bucket.outputs
        outputs = self._compute(shape, bucket.integers)
        if self._can_capture:  # a capture runs nothing; the kernels are compiled by now
            self._capture(shape, bucket)
        return outputs

    def _capture(self, shape: StepShape, bucket: _Bucket) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = self._compute(shape, bucket.integers)
        except RuntimeError:
            logger.exception("a step could not be captured; steps are launched op by op from now on")
            self._can_capture = False
        else:
            bucket.graph, bucket.outputs = graph, outputs

    def _compute(self, shape: StepShape, integers: Tensor) -> StepLogits:
        token_rows, singles, tiles, logit_rows = pieces(integers, shape)
        input_ids, positions, table_rows, _ = token_rows
        block_size = self._kv.block_size
        blocks = self._attention.block_tables.tables[table_rows, positions // block_size]
        rows = TokenRows(input_ids, positions, blocks, positions % block_size)
        if self._attention.queries_per_tile is None:
            step = self._attention.make_by_rows(rows, table_rows)
        else:
            step = self._attention.make_by_tiles(rows, singles, tiles, can_split=shape.can_split)
        needed_rows = logit_rows if shape.is_mixed else None
        count = shape.num_logit_rows if shape.is_mixed else shape.num_rows
        logits = self._model.forward(rows, self._kv, step, needed_rows, out=self._logits[:count])
        return StepLogits(logits, logits.argmax(-1), finite_rows(logits))


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
