"""Training of r × r cores: one optimization step of every resident user in one pass through the frozen model.

Knows no Redis, no clock and no asyncio. Runs join and leave between steps. Except for rounding, the result of
a run does not depend on who shares its batches: a user's loss is the sum over the tokens to learn divided by
the user's own number of them, and only the product with R distinguishes users.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tessera.errors import BasisMismatch, InvalidInput
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.methods.scaling import NO_SCALING, Scaling
from tessera.model.base_model import BaseModel
from tessera.model.rank_pattern import module_ranks
from trainer_worker.data.training_data import GPU_MIN_TOKENS, MicroBatch, TrainingData
from trainer_worker.training.objectives.objective import SUPERVISED, Objective, Sample, num_tokens
from trainer_worker.training.objectives.tally import Tally
from trainer_worker.training.optimizers import UserStep, clip_factor
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.run import RunResult, RunUpdate, TokenCounts, TrainRun
from trainer_worker.training.slots import Slots
from trainer_worker.training.trainable_linear import trainable_modules


class CoreRun(TrainRun):
    """A run that trains a core in a stored basis.

    R, m, v, best_R: the trained numbers that the core is made of, in the shape of `Basis.cores`: [M, r, r]
    for R' (`Basis.fold`), less for a method that trains fewer.
    """

    keeps_states = True

    def __init__(
        self,
        run_id: str,
        data: TrainingData,
        plan: TrainingPlan,
        basis: Basis,
        *,
        start: Tensor | None = None,
        scaling: Scaling = NO_SCALING,
        objective: Objective = SUPERVISED,
        refers_to_base: bool = True,
    ) -> None:
        """start: the stored core to begin with, [M, r, r]; None begins with the base model.

        scaling: s in delta_W = s B' R' A', if it is another than that of the basis. What training begins with
        does not depend on it.

        refers_to_base: whether the reference of pairs is the base model; otherwise it is `start`.

        Raises `InvalidInput` if start has another shape.
        """
        shape = (basis.num_modules, basis.rank, basis.rank)
        if start is not None and tuple(start.shape) != shape:
            message = f"the adapter to start from has R {list(start.shape)}, the basis needs {list(shape)}"
            raise InvalidInput(message, param="warm_start_from")
        self.scale = core_scale(basis, scaling)
        R = torch.zeros(basis.cores.shape)
        if start is not None:
            R = basis.cores.solve(start.double() / self.scale.double()[:, None, None]).float()
        super().__init__(run_id, data, plan, R=R, objective=objective)
        self.basis, self.refers_to_base = basis, refers_to_base

    @property
    def basis_id(self) -> str:
        return self.basis.basis_id

    @property
    def identity(self) -> str:
        return self.basis_id if bool((self.scale == 1).all()) else f"{self.basis_id} {self.scale.tolist()}"

    @property
    def provenance(self) -> dict[str, Any]:
        return {"method": self.basis.manifest.method}

    @property
    def members(self) -> Sequence[CoreRun]:
        """The runs that are trained for this one, each in a slot of its own."""
        return [self]

    def settle(self, updates: list[RunUpdate]) -> list[RunUpdate]:
        """Take the updates that a step had for the members, and return those of this run."""
        return updates

    def make_trainer(self, base: BaseModel, *, max_runs: int, token_budget: int) -> Trainer:
        trainer = Trainer(base, self.basis, max_runs=max_runs, token_budget=token_budget)
        trainer.join(self)
        return trainer

    def to_result(self, base: BaseModel, metadata: dict[str, Any]) -> RunResult:
        """Return the published state with the preconditioner folded in."""
        return RunResult(self.to_adapter(self.published_R, metadata), stored_basis=self.basis)

    def to_adapter(self, R: Tensor, metadata: dict[str, Any]) -> Adapter:
        """Return a state of this run in stored form. R: the trained numbers, [*shape] of `Basis.cores`.

        The numbers themselves are stored if they are fewer than R, and if s can be a part of them.
        """
        cores, scale = self.basis.cores, self.scale.double()
        core = cores.expand(R.double()) * scale[:, None, None]
        trained = None if cores.is_free else cores.scale(R.double(), scale)
        return Adapter(
            self.basis_id, core.float().contiguous(), metadata,
            trained=None if trained is None else trained.float(),
        )  # fmt: skip


def core_scale(basis: Basis, scaling: Scaling) -> Tensor:
    """Return the factor on the s that the basis was built with, for each module, [M] float32."""
    options = basis.manifest.recipe.get("options")
    own = float(options.get("scale", 1.0)) if isinstance(options, dict) else 1.0
    recipe, names = basis.manifest.recipe, [module.name for module in basis.manifest.modules]
    pattern = recipe.get("rank_pattern")
    ranks = module_ranks(names, int(recipe["rank"]) if pattern else basis.rank, pattern)
    return torch.tensor([(scaling.of(rank) or own) / own for rank in ranks])


class Trainer:
    """The runs that are trained together, all in one basis.

    Each run takes a slot (`slots.py`), or several if it is a search (`CoreRun.members`). There are `max_runs`
    slots, and more while searches need them; A and B are on the model's device.
    """

    def __init__(self, base: BaseModel, basis: Basis, *, max_runs: int, token_budget: int) -> None:
        """token_budget: tokens with padding in one pass through the model. Raises `BasisMismatch`."""
        if basis.manifest.model_id != base.model_id:
            raise BasisMismatch(f"basis {basis.basis_id} belongs to model {basis.manifest.model_id}")
        self.base, self.basis, self.token_budget = base, basis, token_budget
        self._device = base.device
        self._layers = trainable_modules(base.model, [module.name for module in basis.manifest.modules])
        device, layer_dtype = self._device, self._layers[0].weight.dtype
        dtype = torch.float64 if layer_dtype == torch.float64 else torch.float32
        self.tokens = TokenCounts()
        self._min_tokens = 0 if device.type == "cpu" else GPU_MIN_TOKENS
        self._max_runs = max_runs
        #: The runs whose members have the slots.
        self._residents: list[CoreRun] = []
        self._slots = Slots(basis, max_runs, dtype=dtype, layer_dtype=layer_dtype, device=device)

    @property
    def runs(self) -> list[TrainRun]:
        return list(self._residents)

    @property
    def has_room(self) -> bool:
        return len(self._residents) < self._max_runs

    @property
    def is_reusable(self) -> bool:
        return True

    def try_join(self, run: TrainRun) -> bool:
        """Make a run resident if it trains in this basis and there is room; returns whether it did."""
        if not isinstance(run, CoreRun) or run.basis_id != self.basis.basis_id or not self.has_room:
            return False
        self.join(run)
        return True

    def join(self, run: CoreRun) -> None:
        """Make a run resident. Raises `BasisMismatch`."""
        if run.basis_id != self.basis.basis_id:
            raise BasisMismatch(f"run {run.run_id} trains in basis {run.basis_id}")
        assert self.has_room, "more runs than max_runs"
        self._residents.append(run)
        self._slots.add([member for member in run.members if not member.is_finished])

    def leave(self, run_id: str) -> TrainRun | None:
        """Take a run out, with its tensors; None if it is not resident. Its slots are zeroed."""
        run = next((run for run in self._residents if run.run_id == run_id), None)
        if run is None:
            return None
        self._residents.remove(run)
        for slot, member in enumerate(self._slots.members):
            if member is not None and any(member is other for other in run.members):
                self._slots.free(slot)
        if not self._residents and self._slots.num_slots > self._max_runs:
            self._slots.resize(self._max_runs)
        return run

    def step(self) -> list[RunUpdate]:
        """Evaluate the runs that are due, then make one optimization step of each unfinished run."""
        waiting = [slot for slot, run in self._active() if run.awaits_reference]
        with self.attached():
            updates = self._refer(waiting) if waiting else []
            ready = [slot for slot, _ in self._active() if slot not in waiting]
            updates += self._evaluate([slot for slot in ready if self._at(slot).needs_evaluation])
            updates += self._train([slot for slot in ready if not self._at(slot).is_finished])
        return self._settle(updates)

    def _refer(self, slots: Sequence[int]) -> list[RunUpdate]:
        """Compute the reference of some of the pairs of each of these runs, which make no step meanwhile."""
        samples = {slot: self._at(slot).reference_samples(min_tokens=self._min_tokens) for slot in slots}
        with torch.no_grad():
            logps = self._pass(samples).logps()
        return [self._at(slot).record_reference(logps[slot]) for slot in slots]

    def _evaluate(self, slots: Sequence[int]) -> list[RunUpdate]:
        with torch.no_grad():
            measured = self._pass({slot: self._at(slot).validation() for slot in slots}).measured()
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
        measured = self._pass(batches, learn=True).measured()
        gradients = self._slots.gradients()
        norms = torch.linalg.vector_norm(gradients, dim=(1, 2, 3)).tolist()
        users, updates = [], []
        for slot, batch in batches.items():
            run, rate = self._at(slot), self._at(slot).learning_rate
            if not (math.isfinite(measured[slot].loss) and math.isfinite(norms[slot])):
                warning = run.record_nonfinite()
                updates.append(run.update(learning_rate=rate, warnings=[warning]))
                continue
            run.record_step(measured[slot].loss, num_tokens(batch))
            clip = clip_factor(norms[slot], run.plan.max_grad_norm)
            users.append(UserStep.of(run.plan, slot, rate, run.progress.num_updates, clip))
            update = run.update(learning_rate=rate)
            run.show_step(update, measured[slot])
            updates.append(update)
        self._slots.optimize(gradients, users)
        return updates

    def _pass(self, samples: Mapping[int, Sequence[Sample]], *, learn: bool = False) -> Tally:
        """Send the samples of the slots through the model and measure them.

        With `learn`, the slots hold the gradients of their losses afterwards.
        """
        objectives = {slot: self._at(slot).objective for slot in samples}
        tally = Tally(samples, objectives, num_slots=self._slots.num_slots, device=self._device)
        self._slots.zero_gradients()
        for batch in tally.passes(token_budget=self.token_budget, min_tokens=self._min_tokens):
            self._slots.owners.rows, self._slots.owners.length = batch.rows, batch.token_ids.shape[1]
            trained = batch.num_tokens if learn else 0
            self.tokens += TokenCounts(trained, batch.num_tokens - trained, batch.num_padding)
            losses, is_correct = token_losses(self.base.model, batch)
            weights = tally.add(batch, losses, is_correct)
            if learn:
                torch.autograd.backward(losses, weights)
        return tally

    @contextmanager
    def attached(self, rows: Tensor | None = None) -> Iterator[None]:
        """Put this basis and the current cores into the model's layers, and take them out afterwards.

        rows: int64 [S], the slots of the rows of the next pass.
        """
        if rows is not None:
            self._slots.owners.rows, self._slots.owners.length = rows, None
        self._slots.fold(
            without=[slot for slot, run in self._active() if run.awaits_reference and run.refers_to_base]
        )
        for layer, delta in zip(self._layers, self._slots.deltas, strict=True):
            layer.delta = delta
        try:
            yield
        finally:
            for layer in self._layers:
                layer.delta = None

    def _settle(self, updates: Sequence[RunUpdate]) -> list[RunUpdate]:
        """Return the updates of the runs from those of their members, and free the slots of ended members."""
        settled = []
        for run in self._residents:
            ids = {member.run_id for member in run.members}
            settled += run.settle([update for update in updates if update.run_id in ids])
            for slot, member in enumerate(self._slots.members):
                if member is not None and member is not run and member.run_id in ids and member.is_finished:
                    self._slots.free(slot)
        return settled

    def _active(self) -> list[tuple[int, CoreRun]]:
        members = enumerate(self._slots.members)
        return [(slot, run) for slot, run in members if run is not None and not run.is_finished]

    def _at(self, slot: int) -> CoreRun:
        return self._slots.at(slot)


def token_losses(model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """-log p of each token to learn, float32 or wider [N], and whether it was the most likely one, bool [N].

    The output head gets only the N hidden states that predict a token to learn: with a vocabulary of 128,000,
    the logits of all tokens would be the largest tensor of the step. A hook in front of the head selects the
    states, so that whatever the model does to its logits afterwards (soft caps, scales) is applied as usual.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)

    def select(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        hidden: Tensor = inputs[0]  # [S, L, d]
        return (hidden.flatten(0, 1).index_select(0, batch.positions)[None],)

    hook = head.register_forward_pre_hook(select)
    try:
        logits = model(input_ids=batch.token_ids, use_cache=False).logits[0]  # [N, V]
    finally:
        hook.remove()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        is_correct = logits.argmax(-1) == batch.targets
    return F.cross_entropy(logits, batch.targets, reduction="none"), is_correct
