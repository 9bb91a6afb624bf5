"""Runs the model for one step: turns a plan into a token and log-probabilities for every chunk.

    launch    upload the integers of the step, run the model, sample; nothing waits for the device
    collect   wait for the device and read the results (`PendingResults`)

Decides nothing about requests: the plan determines what is computed, and the parameters of its requests
determine what is reported.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from service.engine.adapters.resident_bases import ResidentBases
from service.engine.adapters.slots import SlotTable
from service.engine.attention.backend import AttentionKind
from service.engine.forward import self_check
from service.engine.forward.forward_pass import ForwardPass, ModelFacts
from service.engine.kv.cache import PagedKV
from service.engine.scheduling.plan import StepPlan
from service.engine.settings import EngineConfig
from service.engine.steps.batch import SampledTokens, StepBatch, TokenSources, build_batch, find_sources
from service.engine.steps.results import PendingResults, StepLogits
from service.engine.steps.static_steps import StaticSteps
from service.engine.steps.step_attention import StepAttention


class StepNotComputed(Exception):
    """The model failed to compute a step, and nothing of it was sampled. The text is the reason."""


class ModelRunner:
    """Runs plans. The KV goes to `kv`, and the adapters come from `bases`."""

    def __init__(
        self,
        model: PreTrainedModel,
        facts: ModelFacts,
        kv: PagedKV,
        bases: ResidentBases,
        config: EngineConfig,
        *,
        max_model_len: int,
    ) -> None:
        self._config = config
        self._device = torch.device(model.device)
        self._kv = kv
        self._bases = bases
        self._vocab_size = facts.vocab_size
        num_positions = max(max_model_len, self_check.NUM_POSITIONS)
        self._attention = StepAttention(kv, facts, config, num_positions=num_positions)
        self._forward_pass = ForwardPass(
            model, facts, bases, num_positions=num_positions, enable_fused=config.enable_fused
        )
        #: Runs steps over static tensors; None if all steps are launched op by op.
        self.static_steps: StaticSteps | None = None
        self._no_targets = torch.empty(0, dtype=torch.int64, device=self._device)
        self._sampled: SampledTokens | None = None

    @property
    def forward_mode(self) -> str:
        """How the model is run, and why."""
        return self._forward_pass.mode

    def prepare(self) -> None:
        """Decide how the model is run, now that the default basis is known. Otherwise the first step decides
        it."""
        if self._forward_pass.prepare(self._self_check_error):
            self.static_steps = self._make_static_steps()

    def warm_up(self) -> None:
        """Compile and capture what steps over static tensors need, so that no request waits for it. Acts on
        CUDA only. Call this when the default basis is resident and no step is running."""
        self.prepare()
        if self.static_steps is not None and self._device.type == "cuda":
            with torch.inference_mode():
                self.static_steps.warm_up(self._own_slots())

    def launch(self, plan: StepPlan, *, op_by_op: bool = False) -> PendingResults:
        """Start a step. Its pending tokens are those of the step that was launched before.

        op_by_op: do not run it over static tensors. Raises `StepNotComputed`, and an accelerator's own
        errors.
        """
        self.prepare()
        self._forward_pass.follow_bases()
        sources = find_sources(plan.chunks, self._sampled)
        with torch.inference_mode():
            try:
                logits, prompt_targets = self._compute(plan, sources, op_by_op=op_by_op)
            except torch.AcceleratorError:
                raise
            except Exception as error:  # the code of a model or a kernel may raise anything
                raise StepNotComputed(str(error)) from error
            results = PendingResults(plan, logits, prompt_targets)
        requests = [chunk.request for chunk in plan.chunks if chunk.samples]
        self._sampled = SampledTokens(results.tokens, requests)
        return results

    def clear(self, blocks: list[int]) -> None:
        """Clear KV blocks that belonged to another request, as a step does with its `fresh_blocks`."""
        with torch.inference_mode():
            self._kv.clear(torch.tensor(blocks, dtype=torch.int64, device=self._device))

    def close(self) -> None:
        """Restore the model's layers as they were."""
        self.static_steps = None
        self._forward_pass.close()

    def _compute(
        self, plan: StepPlan, sources: TokenSources | None, *, op_by_op: bool
    ) -> tuple[StepLogits, Tensor]:
        """Compute the logits of a step, and the targets of the rows that are scored."""
        steps = self.static_steps
        if steps is not None and not op_by_op and steps.can_run(plan, self._bases.default_id):
            return steps.launch(plan, self._own_slots(), sources), self._no_targets
        batch = self._stage(plan, self._kv, sources)
        self._kv.clear(batch.fresh_blocks)
        step = batch.rows, self._kv, batch.attention, batch.logit_rows
        if not plan.classifying:
            return StepLogits(self._forward_pass.forward(*step)), batch.prompt_targets
        logits, hidden = self._forward_pass.forward_hidden(*step)
        return StepLogits(logits, hidden=hidden[-len(plan.classifying) :]), batch.prompt_targets

    def _own_slots(self) -> SlotTable | None:
        """Return the slots of the fused basis. A step over static tensors has no rows of another basis."""
        for basis_id, table in self._bases.tables.items():
            if basis_id != self._bases.default_id and table.active is not None:
                table.stage(None)
        return self._bases.tables.get(self._bases.default_id)

    def _stage(self, plan: StepPlan, kv: PagedKV, sources: TokenSources | None = None) -> StepBatch:
        batch = build_batch(plan, kv, self._attention.layout, self._device, sources)
        for basis_id, table in self._bases.tables.items():
            slots = batch.slots.get(basis_id)
            if slots is not None or table.active is not None:
                table.stage(slots)
        return batch

    def _make_static_steps(self) -> StaticSteps | None:
        setting, model = self._config.decode_graphs, self._forward_pass.fused
        # Over static tables the reference implementation would gather every request at full length.
        can_capture = self._device.type == "cuda" and self._attention.kind == AttentionKind.TRITON
        is_enabled = setting == "static" or (setting == "auto" and can_capture)
        if model is None or not is_enabled:
            return None
        return StaticSteps(
            model,
            self._kv,
            self._attention,
            max_sequences=self._config.max_running,
            max_tokens=self._config.max_batch_tokens,
        )

    @torch.inference_mode()
    def _self_check_error(self) -> float:
        """Return the difference between the two ways through the model, see `forward/self_check.py`."""
        basis_id = self._bases.default_id
        table = self._bases.tables.get(basis_id)
        if table is None:
            return self_check.disagreement(*self._self_check_logits(basis_id, 0))
        slot = table.begin_self_check(self_check.random_core(table.R_slots.shape[1:]))
        try:
            return self_check.disagreement(*self._self_check_logits(basis_id, slot))
        finally:
            table.end_self_check()

    def _self_check_logits(self, basis_id: str, slot: int) -> list[Tensor]:
        """Return the logits [rows, V] of all rows of the self-check, by the fused and by the generic way."""
        plans = self_check.step_plans(
            self._vocab_size,
            self._kv.block_size,
            basis_id,
            slot=slot,
            max_tokens=self._config.max_batch_tokens,
        )
        logits = []
        assert self._forward_pass.fused is not None
        for forward in (self._forward_pass.fused.forward, self._forward_pass.forward_generic):
            kv = PagedKV(
                self._kv.shapes,
                num_blocks=self_check.num_blocks(self._kv.block_size),
                block_size=self._kv.block_size,
                device=self._device,
                dtype=self._kv.dtype,
            )
            batches = (self._stage(plan, kv) for plan in plans)
            outputs = [forward(batch.rows, kv, batch.attention) for batch in batches]
            logits.append(torch.cat(outputs))
        return logits
