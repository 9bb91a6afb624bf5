"""Training of classifiers: one optimization step of every resident user in shared passes through the model.

    loss of user u = mean over its texts of  -log softmax(W_u h + b_u)[class]      or (W_u h + b_u - target)²

h [d] is the pooled state of the text (`tessera/model/pooling.py`). The heads of all users are
one matrix, padded to the most labels that the trainer takes, and each row uses the part of its owner. Like
`training/trainer.py`, this knows no Redis, no clock and no asyncio, and the result of a run does not depend
on who shares its batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.chat.chat_format import EncodedExample
from tessera.errors import BasisMismatch
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from tessera.model.pooling import pooled_states
from trainer_worker.data.training_data import GPU_MIN_TOKENS, MicroBatch, micro_batches
from trainer_worker.training.classification.data import LabelledRow
from trainer_worker.training.objectives.objective import Measured, Sample, num_tokens
from trainer_worker.training.optimizers import BatchedOptimizer, UserStep, clip_factor
from trainer_worker.training.run import RunUpdate, TokenCounts, TrainRun
from trainer_worker.training.trainable_linear import Delta, RowOwners, trainable_modules

if TYPE_CHECKING:
    from trainer_worker.training.classification.run import ClassificationRun

#: Labels that a trainer has room for, at least, so that users with few labels share one.
MIN_SCORES = 8


class ClassificationTrainer:
    """The classification runs that are trained together, all in one basis.

    Its memory for K = `max_runs` users and C labels: cores, heads, their gradient and moments, 4 K P numbers
    with P = M r² (less where fewer numbers are trained, `cores.py`) + C (d + 1), and A and B on the model's
    device.
    """

    def __init__(
        self, base: BaseModel, basis: Basis, *, width: int, max_scores: int, max_runs: int, token_budget: int
    ) -> None:
        """max_scores: labels of the run with the most. token_budget: tokens with padding in one pass.

        Raises `BasisMismatch`.
        """
        if basis.manifest.model_id != base.model_id:
            raise BasisMismatch(f"basis {basis.basis_id} belongs to model {basis.manifest.model_id}")
        self.base, self.basis, self.token_budget = base, basis, token_budget
        self.max_scores = max(MIN_SCORES, 2 ** math.ceil(math.log2(max_scores)))
        self.tokens = TokenCounts()
        self._device = base.device
        self._layers = trainable_modules(base.model, [module.name for module in basis.manifest.modules])
        device, layer_dtype = self._device, self._layers[0].weight.dtype
        self._dtype = torch.float64 if layer_dtype == torch.float64 else torch.float32
        M, r, K, C = basis.num_modules, basis.rank, max_runs, self.max_scores
        self._cores = basis.cores.to(device, self._dtype)
        self._core_shape, self._head_shape = (K, *self._cores.shape), (K, C, width + 1)
        self._num_core = math.prod(self._cores.shape)
        self._runs: list[ClassificationRun | None] = [None] * K
        size = self._num_core + C * (width + 1)
        self._optimizer = BatchedOptimizer((K, 1, 1, size), dtype=self._dtype, device=device)
        # Module-major, so that each layer's part is contiguous and all gradients are parts of one tensor.
        self._core = torch.zeros(M, K, r, r, dtype=self._dtype, device=device)
        self._core_grad = torch.zeros_like(self._core)
        self._head = torch.zeros(self._head_shape, dtype=self._dtype, device=device, requires_grad=True)
        self._owners = RowOwners(torch.zeros(0, dtype=torch.int64, device=device))
        self._deltas = [
            Delta(A.to(device, layer_dtype), B.to(device, layer_dtype), self._leaf(m), self._owners)
            for m, (A, B) in enumerate(zip(basis.A, basis.B, strict=True))
        ]

    @property
    def runs(self) -> Sequence[TrainRun]:
        return [run for run in self._runs if run is not None]

    @property
    def is_reusable(self) -> bool:
        return True

    def try_join(self, run: TrainRun) -> bool:
        """Make a run resident if it classifies in this basis with no more labels than there is room for;
        returns whether it did."""
        if getattr(run, "labelled", None) is None or run.basis_id != self.basis.basis_id:
            return False
        classifier: ClassificationRun = run  # type: ignore[assignment]
        if classifier.num_scores > self.max_scores or None not in self._runs:
            return False
        self.join(classifier)
        return True

    def join(self, run: ClassificationRun) -> None:
        """Make a run resident. Raises `BasisMismatch`."""
        if run.basis_id != self.basis.basis_id:
            raise BasisMismatch(f"run {run.run_id} trains in basis {run.basis_id}")
        slot = self._runs.index(None)
        self._runs[slot] = run
        for name in ("R", "m", "v"):
            memory = getattr(self._optimizer, name)[slot].view(-1)[: len(run.R)]
            memory.copy_(getattr(run, name))
            setattr(run, name, memory)

    def leave(self, run_id: str) -> TrainRun | None:
        """Take a run out, with its tensors; None if it is not resident. Its slot is zeroed."""
        for slot, run in enumerate(self._runs):
            if run is None or run.run_id != run_id:
                continue
            self._runs[slot] = None
            for name in ("R", "m", "v"):
                memory = getattr(run, name)
                setattr(run, name, memory.cpu().clone())
                memory.zero_()
            return run
        return None

    def step(self) -> list[RunUpdate]:
        """Evaluate the runs that are due, then make one optimization step of each unfinished run."""
        with self._attached():
            updates = self._evaluate([slot for slot, run in self._active() if run.needs_evaluation])
            updates += self._train([slot for slot, _ in self._active()])
        return updates

    def _evaluate(self, slots: Sequence[int]) -> list[RunUpdate]:
        samples = {slot: self._at(slot).validation() for slot in slots}
        with torch.no_grad():
            measured = self._pass(samples)
        updates = []
        for slot in slots:
            run = self._at(slot)
            has_data = bool(run.data.valid)
            run.record_evaluation(measured[slot] if has_data else None)
            update = run.update()
            if has_data:
                run.show_evaluation(update, measured[slot])
            updates.append(update)
        return updates

    def _train(self, slots: Sequence[int]) -> list[RunUpdate]:
        batches = {slot: self._at(slot).next_batch() for slot in slots}
        measured = self._pass(batches, learn=True)
        grad = self._gradient()
        norms = torch.linalg.vector_norm(grad, dim=(1, 2, 3)).tolist()
        users, updates = [], []
        for slot, batch in batches.items():
            run, rate = self._at(slot), self._at(slot).learning_rate
            if not (math.isfinite(measured[slot].loss) and math.isfinite(norms[slot])):
                updates.append(run.update(learning_rate=rate, warnings=[run.record_nonfinite()]))
                continue
            run.record_step(measured[slot].loss, num_tokens(batch))
            clip = clip_factor(norms[slot], run.plan.max_grad_norm)
            users.append(UserStep.of(run.plan, slot, rate, run.progress.num_updates, clip))
            update = run.update(learning_rate=rate)
            run.show_step(update, measured[slot])
            updates.append(update)
        self._optimizer.step(grad, users)
        return updates

    def _gradient(self) -> Tensor:
        """Return the gradient of the packed numbers [K, 1, 1, P] from those of the cores and heads."""
        numbers = self._optimizer.R.flatten(1)[:, : self._num_core].view(self._core_shape)
        cores = self._cores.gradient(numbers, self._core_grad.transpose(0, 1))
        trains_core = torch.tensor(
            [run is not None and not run.head_only for run in self._runs], device=self._device
        )
        cores = torch.where(trains_core[:, None, None, None], cores, 0)
        assert self._head.grad is not None
        heads = self._head.grad * self._head_scales()[:, None, None]
        trains_bias = torch.tensor([run is not None and run.trains_bias for run in self._runs])
        heads[:, :, -1] *= trains_bias.to(heads)[:, None]
        return torch.cat([cores.flatten(1), heads.flatten(1)], dim=1)[:, None, None]

    def _pass(self, samples: Mapping[int, Sequence[Sample]], *, learn: bool = False) -> dict[int, Measured]:
        """Mean loss and share of right classes over the samples of each slot.

        With `learn`, `_core_grad` and `_head.grad` hold the gradients of each slot's loss afterwards.
        """
        K, device = len(self._runs), self._device
        items = [(slot, row) for slot, taken in samples.items() for sample in taken for row in sample.rows]
        counts = torch.tensor([len(samples.get(slot, ())) for slot in range(K)], device=device).clamp_min(1)
        sums = torch.zeros(2, K, dtype=torch.float64, device=device)
        self._core_grad.zero_()
        self._head.grad = torch.zeros_like(self._head)
        # `micro_batches` yields the rows by falling length, so the rows of each pass are known here.
        ordered = sorted(items, key=lambda item: -len(item[1].token_ids))
        first, min_tokens = 0, 0 if device.type == "cpu" else GPU_MIN_TOKENS
        for batch in micro_batches(items, token_budget=self.token_budget, min_tokens=min_tokens):
            in_pass = [_labelled(row) for _, row in ordered[first : first + len(batch.rows)]]
            first += len(in_pass)
            batch = batch.to(device)
            self._owners.rows, self._owners.length = batch.rows, batch.token_ids.shape[1]
            trained = batch.num_tokens if learn else 0
            self.tokens += TokenCounts(trained, batch.num_tokens - trained, batch.num_padding)
            losses, is_correct = self._losses(batch, in_pass)
            if learn:
                torch.autograd.backward((losses / counts[batch.rows]).sum())
            sums.index_add_(1, batch.rows, torch.stack([losses.detach(), is_correct]).double())
        loss, accuracy = (sums / counts).tolist()
        return {slot: Measured(loss[slot], accuracy[slot]) for slot in samples}

    def _losses(self, batch: MicroBatch, in_pass: Sequence[LabelledRow]) -> tuple[Tensor, Tensor]:
        """Return the loss of each row, float32 or wider [S], and whether its class was found, [S]."""
        device, num_rows = self._device, len(in_pass)
        lengths = torch.tensor([len(row.token_ids) for row in in_pass], device=device)
        targets = torch.tensor([row.target for row in in_pass], dtype=self._dtype, device=device)
        first_lengths = torch.tensor([row.first_length for row in in_pass], device=device)
        hidden = pooled_states(self.base.model, batch.token_ids, lengths, first_lengths).to(self._dtype)
        K, C, _ = self._head_shape
        every = F.linear(hidden, self._head[:, :, :-1].flatten(0, 1), self._head[:, :, -1].flatten())
        scores = every.view(num_rows, K, C)[torch.arange(num_rows, device=device), batch.rows]
        num_scores = torch.tensor([0 if run is None else run.num_scores for run in self._runs], device=device)
        is_padding = torch.arange(C, device=device) >= num_scores[batch.rows, None]
        scores = scores.masked_fill(is_padding, -math.inf)
        is_regression = torch.tensor([run is not None and run.is_regression for run in self._runs])
        is_regression = is_regression.to(device)[batch.rows]
        classes = torch.where(is_regression, 0, targets).long()
        losses = torch.where(
            is_regression,
            (scores[:, 0] - targets) ** 2,
            F.cross_entropy(scores, classes, reduction="none"),
        )
        return losses, scores.detach().argmax(1) == classes

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """Put this basis and the current cores into the model's layers, and take them out afterwards."""
        with torch.no_grad():
            packed = self._optimizer.R.flatten(1)
            core = self._cores.expand(packed[:, : self._num_core].view(self._core_shape))
            self._core.copy_(core.transpose(0, 1))
            heads = packed[:, self._num_core :].view(self._head_shape)
            self._head.copy_(heads * self._head_scales()[:, None, None])
        for layer, delta in zip(self._layers, self._deltas, strict=True):
            layer.delta = delta
        try:
            yield
        finally:
            for layer in self._layers:
                layer.delta = None

    def _head_scales(self) -> Tensor:
        """Return the factor between the trained and the used numbers of each head, [K]."""
        scales = [1.0 if run is None else run.head_scale for run in self._runs]
        return torch.tensor(scales, dtype=self._dtype, device=self._device)

    def _leaf(self, module: int) -> Tensor:
        """R of one module for all users, [K, r, r], as a leaf whose gradient is a part of `_core_grad`."""
        leaf = self._core[module].requires_grad_()
        leaf.grad = self._core_grad[module]
        return leaf

    def _active(self) -> list[tuple[int, ClassificationRun]]:
        return [(slot, run) for slot, run in enumerate(self._runs) if run is not None and not run.is_finished]

    def _at(self, slot: int) -> ClassificationRun:
        run = self._runs[slot]
        assert run is not None
        return run


def _labelled(row: EncodedExample) -> LabelledRow:
    assert isinstance(row, LabelledRow)
    return row
