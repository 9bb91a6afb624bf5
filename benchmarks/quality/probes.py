"""Beside the sweeps: how much of W matters (T5), how many examples a gradient basis needs (T7), how well A
recalls its inputs while B learns (T15), and what the training's precision changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.cases import CASES, SB_COUNTS, Case
from benchmarks.quality.core_runs import Sweep, build_case, train_case
from benchmarks.quality.data import DataSet, mean_token_loss
from benchmarks.quality.settings import Settings
from tessera.methods.bases import CalibrationSet
from tessera.methods.building.targets import Target, find_targets
from tessera.methods.forms import LORA_PRESETS
from tessera.methods.init import make_init
from tessera.model.base_model import BaseModel
from trainer_worker.training.lora.factors import initial_factors
from trainer_worker.training.lora.trainer import LoraRun, LoraTrainer

#: Of LoRA-XS, tables 6 to 8.
GROUPS = {"qkv": ("q_proj", "k_proj", "v_proj"), "ffn_in": ("gate_proj", "up_proj")}
FRACTIONS = (0.1, 0.25)
PARTS = ("top", "middle", "bottom")
#: Times that T15 looks, and examples that it looks at.
NUM_LOOKS, LOOK_EXAMPLES = 10, 32


def retention(base: BaseModel, data: DataSet, settings: Settings) -> list[dict[str, Any]]:
    """The loss of the base model with only a part of the singular values of a group of weights (T5)."""

    def loss() -> float:
        return mean_token_loss(base, data.data.valid, token_budget=settings.token_budget)

    rows: list[dict[str, Any]] = [{"probe": "retention", "data": data.name, "group": "none", "loss": loss()}]
    for group, names in GROUPS.items():
        targets = find_targets(base.model, names, 1)
        parts = [tuple(torch.linalg.svd(t.weight.float(), full_matrices=False)) for t in targets]
        for fraction in FRACTIONS:
            for part in PARTS:
                with _replaced(targets, [_kept(usv, fraction, part) for usv in parts]):
                    row = {"group": group, "fraction": fraction, "part": part, "loss": loss()}
                rows.append({"probe": "retention", "data": data.name, **row})
    return rows


def _kept(usv: tuple[Tensor, Tensor, Tensor], fraction: float, part: str) -> Tensor:
    U, S, Vh = usv
    count = max(1, round(fraction * len(S)))
    first = {"top": 0, "middle": (len(S) - count) // 2, "bottom": len(S) - count}[part]
    chosen = slice(first, first + count)
    return U[:, chosen] * S[chosen] @ Vh[chosen]


@contextmanager
def _replaced(targets: Sequence[Target], weights: Sequence[Tensor]) -> Iterator[None]:
    before = [target.weight.clone() for target in targets]
    try:
        for target, weight in zip(targets, weights, strict=True):
            target.weight.copy_(weight)
        yield
    finally:
        for target, weight in zip(targets, before, strict=True):
            target.weight.copy_(weight)


def precision(
    base: BaseModel, case: Case, rank: int, data: DataSet, settings: Settings
) -> list[dict[str, Any]]:
    """The final losses of one sweep with training passes in the fast precision and in full float32."""
    rows = []
    built = build_case(base, case, rank, data, settings)
    for is_fast in (True, False):
        own = dataclasses.replace(settings, is_fast=is_fast)
        for run in train_case(base, case.name, built, Sweep([data], (0,), case.rates), own):
            row = {"case": case.name, "rank": rank, "rate": run.rate, "is_fast": is_fast, "loss": run.loss}
            rows.append({"probe": "precision", "data": data.name, **row})
    return rows


def samples(base: BaseModel, data: DataSet, rank: int, settings: Settings) -> list[dict[str, Any]]:
    """How much of the held-out examples' gradient LoRA-SB's basis of so many examples catches (T7).

    ‖Bᵀ g Aᵀ‖² over all modules, as a share of what is caught by the best basis there is, that of the held-out
    gradient's own singular vectors.
    """
    held_out = CalibrationSet.from_encoded(data.data.valid)

    def caught(case: Case, source: DataSet) -> float:
        basis = build_case(base, case, rank, source, settings).basis
        step = make_init(
            basis, method="gradient", base=base, calibration=held_out, eta_init="value", eta=1.0,
            num_examples=len(held_out),
        )  # fmt: skip
        return float(basis.fold(step.double()).square().sum())

    own = DataSet(data.name, dataclasses.replace(data.data, train=data.data.valid))
    best = caught(CASES["gradient_svd"], own)
    return [
        {"probe": "samples", "data": data.name, "rank": rank, "examples": count,
         "share": caught(CASES[f"lora_sb_n{count}"], data) / best}
        for count in SB_COUNTS
    ]  # fmt: skip


def recall(
    base: BaseModel, data: DataSet, rank: int, rate: float, settings: Settings
) -> list[dict[str, Any]]:
    """The share of the centred inputs that A does not recall, for HPCA and EVA, with B frozen and trained
    (T15).

    1 - ‖z Q‖² / ‖z‖² with Q an orthonormal basis of A's rows, on held-out examples, the mean over all
    modules.
    """
    plan = settings.plan(data, rate=rate, seed=0)
    preset = LORA_PRESETS["lolora"]
    runs = []
    for is_trained in (False, True):
        own = dataclasses.replace(preset, b_rate=1.0 if is_trained else 0.0)
        factors = initial_factors(base, own, rank=rank)
        runs.append(LoraRun("trained" if is_trained else "frozen", data.data, plan, factors))
    eva = initial_factors(
        base, "eva_fa", rank=rank, calibration=data.calibration, num_examples=settings.calibration
    )
    eva_A = [A.to(base.device) for A in eva.A]
    trainer = LoraTrainer(base, runs, token_budget=2**31, min_tokens=2**31)
    rows = []
    every = max(1, plan.total_steps // NUM_LOOKS)
    while not trainer.is_finished:
        step = runs[0].progress.step
        if step % every == 0 or step == plan.total_steps:
            errors = _recall_errors(base, trainer, data, eva_A)
            rows += [
                {"probe": "recall", "data": data.name, "rank": rank, "step": step, "B": run.run_id, **error}
                for run, error in zip(runs, errors, strict=True)
            ]
        trainer.step()
    return rows


@torch.no_grad()
def _recall_errors(
    base: BaseModel, trainer: LoraTrainer, data: DataSet, eva_A: Sequence[Tensor]
) -> list[dict[str, float]]:
    """For each run the mean recall error of its own A and of EVA's."""
    examples = data.data.valid[:LOOK_EXAMPLES]
    modules = trainer.runs[0].factors.modules
    inputs: dict[str, list[Tensor]] = {shape.name: [] for shape in modules}
    handles = [
        base.model.get_submodule(shape.name).register_forward_pre_hook(
            lambda _module, args, seen=inputs[shape.name]: seen.append(args[0].flatten(0, 1).float())
        )
        for shape in modules
    ]
    sums = []
    try:
        for slot, run in enumerate(trainer.runs):
            for seen in inputs.values():
                seen.clear()
            for example in examples:
                owner = torch.tensor([slot], device=base.device)
                with trainer.attached(owner):
                    base.model(
                        input_ids=torch.tensor([example.token_ids], device=base.device), use_cache=False
                    )
            own_A = [A for A, _ in run.trained(run.R)]
            z = [torch.cat(inputs[shape.name]) for shape in modules]
            z = [x - x.mean(0) for x in z]
            sums.append({"hpca": _mean_error(z, own_A), "eva": _mean_error(z, eva_A)})
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _mean_error(inputs: Sequence[Tensor], all_A: Sequence[Tensor]) -> float:
    errors = []
    for z, A in zip(inputs, all_A, strict=True):
        Q = torch.linalg.qr(A.detach().to(z).mT)[0]
        errors.append(float(1 - (z @ Q).square().sum() / z.square().sum()))
    return sum(errors) / len(errors)
