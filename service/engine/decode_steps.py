"""Steps in which every sequence decodes one token, over static buffers: what a CUDA graph can replay.

    upload     one copy: ids, positions, table rows and slots of n sequences, padded to a bucket of b rows
    compute    from the buffers to logits, largest tokens and their finiteness: captured once per bucket
    padding    position -1, slot 0, the null row of the block tables: writes no KV, attends to nothing

Elsewhere than on CUDA, and the first time in each bucket, `compute` just runs. Knows the fused path only:
what the generic one does between its ops is not ours to capture.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.engine.batch import TokenRows
from service.engine.fused.layers import FusedModel
from service.engine.kv_cache import PagedKV
from service.engine.logprobs import finite_rows
from service.engine.plan import StepPlan
from service.engine.slots import SlotTable
from service.engine.step_attention import StepAttention
from service.engine.step_results import StepLogits
from service.engine.token_sources import TokenSources
from service.engine.transfer import upload

logger = logging.getLogger(__name__)

#: (up to so many rows, buckets grow by so many): 24 buckets up to 256 rows.
_BUCKET_STEPS = ((4, 1), (64, 8), (256, 16), (1 << 30, 32))


@dataclass
class _Bucket:
    """inputs: int64 [4, b], see `DecodeSteps.launch`. The rest is what `compute` leaves."""

    inputs: Tensor
    graph: torch.cuda.CUDAGraph | None = None
    outputs: StepLogits | None = None


class DecodeSteps:
    """Decode steps of up to `max_rows` sequences by `model`. logits: [max_rows, V], where a step leaves its
    own, valid until the next one."""

    def __init__(
        self,
        model: FusedModel,
        kv: PagedKV,
        attention: StepAttention,
        *,
        max_rows: int,
        logits: Tensor,
    ) -> None:
        self._model = model
        self._kv = kv
        self._attention = attention
        self._max_rows = max_rows
        self._logits = logits
        self._device = logits.device
        self._can_capture = self._device.type == "cuda"
        self._pool: Any = torch.cuda.graph_pool_handle() if self._can_capture else None
        self._buckets: dict[tuple[int, bool], _Bucket] = {}
        self._last: tuple[_Bucket, bool] | None = None

    @property
    def num_graphs(self) -> int:
        return sum(bucket.graph is not None for bucket in self._buckets.values())

    def launch(
        self, plan: StepPlan, slots: SlotTable | None, sources: TokenSources | None, *, can_split: bool
    ) -> StepLogits:
        """Start a step of one-token chunks that all sample, with adapters of the fused basis or none.

        slots: of the fused basis. sources: where ids that the host does not know yet come from. can_split:
        see `StepAttention.can_split`.
        """
        chunks = plan.chunks
        count, size = len(chunks), bucket_size(len(chunks), self._max_rows)
        table_rows, entries = self._attention.block_tables.plan([chunk.sequence.blocks for chunk in chunks])
        inputs = np.zeros((4, size), np.int64)
        inputs[1] = -1
        inputs[0, :count] = [chunk.sequence.token_ids[chunk.start] for chunk in chunks]
        inputs[1, :count] = [chunk.start for chunk in chunks]
        inputs[2, :count] = table_rows
        inputs[3, :count] = [chunk.sequence.slot for chunk in chunks]
        arrays = [inputs, entries, np.asarray(plan.fresh_blocks, np.int64)]
        if sources is not None:
            arrays.append(sources.rows)
        uploaded, new_entries, fresh_blocks, *source_rows = upload(arrays, self._device)
        self._attention.block_tables.write(new_entries)
        if plan.fresh_blocks:
            self._kv.clear(fresh_blocks)
        bucket = self._bucket(size, can_split)
        bucket.inputs.copy_(uploaded)
        if sources is not None:
            bucket.inputs[0, :count] = sources.fill_in(bucket.inputs[0, :count], source_rows[0])
        if slots is not None:
            slots.stage(bucket.inputs[3])
        self._last = (bucket, can_split)
        outputs = self._run(bucket, can_split)
        assert outputs.greedy is not None
        assert outputs.is_finite is not None
        return StepLogits(outputs.logits[:count], outputs.greedy[:count], outputs.is_finite[:count])

    @property
    def can_repeat(self) -> bool:
        return self._last is not None

    def repeat(self) -> None:
        """The last step's computation once more, over the same buffers: for measurements."""
        assert self._last is not None
        with torch.inference_mode():
            self._run(*self._last)

    def _bucket(self, size: int, can_split: bool) -> _Bucket:
        key = (size, can_split)
        if key not in self._buckets:
            inputs = torch.zeros(4, size, dtype=torch.int64, device=self._device)
            self._buckets[key] = _Bucket(inputs)
        return self._buckets[key]

    def _run(self, bucket: _Bucket, can_split: bool) -> StepLogits:
        if bucket.graph is not None and bucket.outputs is not None:
            bucket.graph.replay()
            return bucket.outputs
        outputs = self._compute(bucket, can_split)
        if self._can_capture:  # nothing runs while it is captured; the kernels are compiled by now
            self._capture(bucket, can_split)
        return outputs

    def _capture(self, bucket: _Bucket, can_split: bool) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = self._compute(bucket, can_split)
        except RuntimeError:
            logger.exception("a decode step could not be captured; steps are launched op by op from now on")
            self._can_capture = False
        else:
            bucket.graph, bucket.outputs = graph, outputs

    def _compute(self, bucket: _Bucket, can_split: bool) -> StepLogits:
        input_ids, positions, table_rows, _ = bucket.inputs
        block_size = self._kv.block_size
        known = positions.clamp(min=0)
        tables = self._attention.block_tables.tables.index_select(0, table_rows)
        blocks = tables.gather(1, (known // block_size)[:, None])[:, 0]
        places = blocks, known % block_size
        step = self._attention.make_decode(
            TokenRows(input_ids, positions, *places), tables, can_split=can_split
        )
        rows = TokenRows(input_ids, known, *places)
        logits = self._model.forward(rows, self._kv, step, out=self._logits[: len(input_ids)])
        return StepLogits(logits, logits.argmax(-1), finite_rows(logits))


def bucket_size(count: int, max_rows: int) -> int:
    """Rows of the smallest bucket for `count` sequences, the largest being `max_rows`."""
    step = next(step for limit, step in _BUCKET_STEPS if count <= limit)
    return min(-(-count // step) * step, max_rows)
