"""Runs an encoder for one step: the texts that are due, whole, to their pooled states and their classes.

An encoder has no KV cache, because later tokens change earlier ones. The scheduler plans it like any other
model: it admits requests fairly, by their tokens, and cuts long texts into chunks. The chunks of a text
before its last one compute nothing, and the last one computes the text as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from service.engine.adapters.resident_bases import ResidentBases
from service.engine.scheduling.plan import StepPlan
from service.engine.scheduling.request import EngineRequest
from service.engine.settings import EngineConfig
from service.engine.steps.results import StepOutcome, classify
from service.engine.steps.runner import StepNotComputed
from service.engine.steps.static_steps import StaticSteps
from tessera.errors import UnsupportedModel
from tessera.model.pooling import pooled_states

#: A text shorter than this fraction of the longest one of its pass goes into the next pass, as in training.
MIN_FILL = 0.7
#: Lengths of the texts with which the model is compared with itself before it serves.
_TRIAL_LENGTHS = (3, 11, 7)
#: Largest difference of a state as a share of the largest number in it, by dtype.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class EncoderRunner:
    """Runs plans over an encoder, with the adapters of `bases`."""

    def __init__(self, model: PreTrainedModel, bases: ResidentBases, config: EngineConfig) -> None:
        self._model, self._bases, self._max_tokens = model, bases, config.max_batch_tokens
        self._device = torch.device(model.device)
        self._is_tried = False
        #: An encoder never runs as CUDA graphs.
        self.static_steps: StaticSteps | None = None

    @property
    def forward_mode(self) -> str:
        """How the model is run."""
        return "encoder: whole texts, padded"

    def prepare(self) -> None:
        """Compare texts that share a pass with each of them alone, once. Raises `UnsupportedModel`."""
        if not self._is_tried:
            self._try()
            self._is_tried = True

    def warm_up(self) -> None:
        """Try the model; there is nothing to compile."""
        self.prepare()

    def launch(self, plan: StepPlan, *, op_by_op: bool = False) -> EncoderResults:
        """Compute the texts whose last chunk is in the plan. Raises `StepNotComputed`, and an accelerator's
        own errors."""
        requests = [plan.chunks[index].request for index in plan.classifying]
        states: list[Tensor | None] = [None] * len(requests)
        with torch.inference_mode():
            try:
                for indices in self._passes(requests):
                    pooled = self._pool([requests[index] for index in indices]).float().cpu()
                    for index, state in zip(indices, pooled, strict=True):
                        states[index] = state
            except torch.AcceleratorError:
                raise
            except Exception as error:  # the code of a model or a kernel may raise anything
                raise StepNotComputed(str(error)) from error
        return EncoderResults(plan, states)

    def clear(self, blocks: list[int]) -> None:
        """There is no KV to clear."""

    def close(self) -> None:
        """There is nothing to restore."""

    def _passes(self, requests: Sequence[EngineRequest]) -> Iterator[list[int]]:
        """Group the requests into passes of similar lengths and at most max_batch_tokens with padding."""
        group: list[int] = []
        longest = 0
        for index in sorted(range(len(requests)), key=lambda i: -requests[i].num_prompt):
            length = requests[index].num_prompt
            is_full = (len(group) + 1) * longest > self._max_tokens
            if group and (is_full or length < MIN_FILL * longest):
                yield group
                group = []
            longest = longest if group else length
            group.append(index)
        if group:
            yield group

    def _pool(self, requests: Sequence[EngineRequest]) -> Tensor:
        """Return the pooled states [S, d] of texts that share a pass."""
        longest = max(request.num_prompt for request in requests)
        for basis_id, table in self._bases.tables.items():
            slots = [request.slot if request.basis_id == basis_id else 0 for request in requests]
            per_token = torch.tensor(slots, device=self._device).repeat_interleave(longest)
            table.stage(per_token if any(slots) else None)
        try:
            return self._states(
                [request.token_ids for request in requests],
                [request.submitted.first_length for request in requests],
            )
        finally:
            for table in self._bases.tables.values():
                table.stage(None)

    def _states(self, texts: Sequence[Sequence[int]], first_lengths: Sequence[int]) -> Tensor:
        lengths = [len(text) for text in texts]
        token_ids = torch.zeros(len(texts), max(lengths), dtype=torch.int64)
        for row, text in enumerate(texts):
            token_ids[row, : len(text)] = torch.tensor(text)
        pieces = (token_ids, torch.tensor(lengths), torch.tensor(first_lengths))
        return pooled_states(self._model, *(piece.to(self._device) for piece in pieces))

    @torch.inference_mode()
    def _try(self) -> None:
        """Raise `UnsupportedModel` if texts change when others share their pass."""
        generator = torch.Generator().manual_seed(0)
        vocab_size = int(self._model.config.vocab_size)
        texts = [
            torch.randint(0, vocab_size, (length,), generator=generator).tolist()
            for length in _TRIAL_LENGTHS
            if length <= self._max_tokens
        ]
        together = self._states(texts, [0] * len(texts)).float()
        for text, state in zip(texts, together, strict=True):
            alone = self._states([text], [0])[0].float()
            difference = float((alone - state).abs().max() / alone.abs().max().clamp_min(1e-6))
            if not difference <= _TOLERANCES.get(self._model.dtype, 1e-3):
                name = type(self._model).__name__
                raise UnsupportedModel(
                    f"{name} cannot be served: a text gets another state, by {difference:.2g} of its size, "
                    "when longer ones share its pass",
                    param="base_model",
                )


class EncoderResults:
    """The pooled states of a step. states: float32 [d] each, by index in `plan.classifying`."""

    def __init__(self, plan: StepPlan, states: Sequence[Tensor | None]) -> None:
        self._plan, self._states = plan, states

    def collect(self) -> StepOutcome:
        """Return the classes."""
        outcome = StepOutcome([None] * len(self._plan.chunks))
        for index, state in zip(self._plan.classifying, self._states, strict=True):
            assert state is not None
            if bool(torch.isfinite(state).all()):
                outcome.classifications[index] = classify(self._plan.chunks[index].request, state)
            else:
                outcome.not_finite.add(index)
        return outcome
