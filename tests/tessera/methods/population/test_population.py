"""The learned population basis: what it learns, what it keeps, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.chat.chat_format import EncodedExample
from tessera.errors import CorruptRecord, InvalidInput
from tessera.formats.basis import Basis
from tessera.methods.bases import CalibrationSet, Population, build_basis, build_basis_and_step
from tessera.methods.building.losses import attached, mean_loss
from tessera.methods.init import make_init
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import small_calibration, small_model
from tests.tessera.methods.populations import SHORT, personal
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.trainer import CoreRun, Trainer


@pytest.fixture(scope="module")
def population() -> Population:
    return Population.of([personal(seed) for seed in range(10)])


@pytest.fixture(scope="module")
def learned(small: BaseModel, population: Population) -> Basis:
    return build_basis(
        small, method="population", rank=2, calibration=population,
        passes=6.0, episode_steps=20, basis_rate=0.03,
    )  # fmt: skip


def loss_of_newcomers(base: BaseModel, basis: Basis, start: Tensor | None) -> tuple[float, float]:
    """The mean loss on unseen examples of four users who are new to the basis, before and after training."""
    plan = TrainingPlan(10, 6, 40, 0.05, 0, 2, 40, None)
    trainer = Trainer(base, basis, max_runs=4, token_budget=2048)
    runs = []
    for seed in range(100, 104):
        examples = [EncodedExample(list(ids), list(mask)) for ids, mask in personal(seed, 48).examples]
        data = TrainingData(tuple(examples[:24]), tuple(examples[24:]), digest="")
        runs.append(CoreRun(str(seed), data, plan, basis, start=start))
        trainer.join(runs[-1])
    while not all(run.is_finished for run in runs):
        trainer.step()
    first = [run.progress.initial_valid_loss or 0.0 for run in runs]
    last = [run.progress.valid_loss or 0.0 for run in runs]
    return sum(first) / 4, sum(last) / 4


def test_users_who_were_not_in_the_population_get_further(learned: Basis, population: Population) -> None:
    """Base 4.83; measured: 3.77 in the gradient's basis, 3.47 in the learned one, 3.44 from its start."""
    base = small_model()
    before = build_basis(base, method="gradient_svd", rank=2, calibration=population)
    base_loss, from_gradient = loss_of_newcomers(base, before, None)
    _, from_zero = loss_of_newcomers(base, learned, None)
    start_loss, from_start = loss_of_newcomers(base, learned, learned.start)

    assert from_zero < from_gradient - 0.1
    assert start_loss < base_loss - 0.2
    assert from_start < from_gradient - 0.1


def test_the_recipe_says_who_taught_it(learned: Basis, population: Population) -> None:
    account = learned.manifest.recipe["population"]

    assert account["num_users"] == 8
    assert account["held_out"]["num_users"] == 2
    assert account["examples_per_user"] == [24, 24]
    assert account["plan"]["steps"] == 48
    assert account["curve"][-1][0] == 48
    assert [step for step, _ in account["held_out"]["curve"]] == [0, 48]
    assert account["curve"][-1][1] < account["curve"][0][1] - 0.5
    assert learned.manifest.recipe["calibration"]["digest"] == population.digest
    assert learned.manifest.method == "population"


def test_learning_is_deterministic_by_its_seed(small: BaseModel, population: Population) -> None:
    first = build_basis(small, method="population", rank=2, calibration=population, **SHORT)
    torch.manual_seed(99)
    again = build_basis(small, method="population", rank=2, calibration=population, **SHORT)
    other = build_basis(small, method="population", rank=2, calibration=population, seed=1, **SHORT)

    assert again.basis_id == first.basis_id
    assert other.basis_id != first.basis_id


def test_one_pile_of_examples_is_split_into_users(small: BaseModel, population: Population) -> None:
    pile = CalibrationSet(population.examples)
    basis = build_basis(small, method="population", rank=2, calibration=pile, num_users=6, **SHORT)

    assert basis.manifest.recipe["population"]["num_users"] == 6
    assert basis.start is not None
    assert bool(basis.start.any())


def test_the_start_is_served_and_begun_with(small: BaseModel, learned: Basis, population: Population) -> None:
    """`Basis.start` is a stored core: attached as it is, and unfolded into the trainer's coordinates."""
    assert learned.start is not None
    R0 = make_init(learned, method="population")

    torch.testing.assert_close(learned.fold(R0.double()).float(), learned.start, rtol=1e-4, atol=1e-6)
    with attached(small, learned, learned.start):
        assert mean_loss(small, population) < 4.5
    assert mean_loss(small, population) > 4.6
    with pytest.raises(InvalidInput, match="has no initialization of its own"):
        make_init(build_basis(small, rank=2), method="population")


def test_a_start_is_part_of_the_stored_basis(learned: Basis) -> None:
    blobs, tail = list(learned.module_bytes()), learned.preconditioner_bytes()
    read = Basis.from_bytes(learned.manifest, blobs, tail)

    assert learned.start is not None
    assert read.start is not None
    assert torch.equal(read.start, learned.start)
    assert replace(learned, start=None).digest() != learned.basis_id
    assert replace(learned, start=2 * learned.start).digest() != learned.basis_id
    with pytest.raises(CorruptRecord, match="do not match the digest of basis"):
        Basis.from_bytes(learned.manifest, blobs, tail[: 2 * len(tail) // 3])
    with pytest.raises(CorruptRecord, match="the stored preconditioner has a wrong size"):
        Basis.from_bytes(learned.manifest, blobs, tail[:-4])


def test_the_scale_changes_neither_basis_nor_start(small: BaseModel, population: Population) -> None:
    """It multiplies the learning rate under Adam and nothing else, as with every method."""
    plain, scaled = (
        build_basis(small, method="population", rank=2, calibration=population, scale=scale, **SHORT)
        for scale in (1.0, 4.0)
    )

    torch.testing.assert_close(scaled.P_out, 4 * plain.P_out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled.start, plain.start, rtol=1e-3, atol=1e-5)
    for i in range(plain.num_modules):
        torch.testing.assert_close(scaled.A[i], plain.A[i], rtol=1e-3, atol=1e-4)


def test_without_retractions_the_vectors_lengths_become_the_preconditioner(
    small: BaseModel, population: Population
) -> None:
    options: dict[str, Any] = {**SHORT, "method": "population", "rank": 2, "calibration": population}
    free = build_basis(small, retract_every=0, **options)
    kept = build_basis(small, retract_every=1, **options)
    identity = torch.eye(2).expand_as(free.P_out)

    assert float((kept.P_out - identity).abs().max()) < 1e-4
    assert float((free.P_out - identity).abs().max()) > 1e-2


def test_all_users_at_once_for_the_whole_time(small: BaseModel, population: Population) -> None:
    """Plain joint training; where no episode ends, the start is the mean of the users' cores."""
    basis = build_basis(
        small, method="population", rank=2, calibration=population,
        passes=2.0, num_slots=0, episode_steps=0, held_out=0.0,
    )  # fmt: skip
    plan = basis.manifest.recipe["population"]["plan"]

    assert plan["num_slots"] == 10
    assert plan["episode_steps"] == plan["steps"]
    assert basis.start is not None
    assert bool(basis.start.any())


def test_float16_learns_what_float32_learns(population: Population) -> None:
    """Gradients of a mean loss underflow in float16, so they are computed for a multiple of it."""
    curves = []
    for dtype in (torch.float32, torch.float16):
        basis = build_basis(
            small_model(dtype=dtype), method="population", rank=2, calibration=population, **SHORT
        )
        curves.append([loss for _, loss in basis.manifest.recipe["population"]["curve"]])

    assert curves[1] == pytest.approx(curves[0], rel=0.02)


def test_progress_counts_modules_and_then_all_steps(small: BaseModel, population: Population) -> None:
    seen: list[tuple[int, int]] = []
    built = build_basis_and_step(
        small, method="population", rank=2, calibration=population,
        progress=lambda done, total: seen.append((done, total)), **SHORT,
    )  # fmt: skip
    account = built.basis.manifest.recipe["population"]
    trials = account["held_out"]
    total = 14 + account["plan"]["steps"] + len(trials["curve"]) * trials["steps"]

    assert seen == [(done, total) for done in range(1, total + 1)]
    assert built.step is None


def test_whoever_watches_the_progress_may_end_it(population: Population) -> None:
    """A job that is cancelled raises from its progress; the model is then as it was."""
    base = small_model()
    before = base.model.lm_head.weight.clone()

    def watch(done: int, total: int) -> None:
        if done == 17:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        build_basis(base, method="population", rank=2, calibration=population, progress=watch, **SHORT)

    assert torch.equal(base.model.lm_head.weight, before)
    assert not any(module._forward_hooks for module in base.model.modules())
    assert all(parameter.grad is None for parameter in base.model.parameters())


@pytest.mark.parametrize(
    ("calibration", "options", "message"),
    [
        (Population.of([small_calibration(8)]), {}, "a population has at least 2 users, this one 1"),
        (small_calibration(3), {}, "3 examples are too few for 2 users"),
        (small_calibration(12), {"num_users": 7}, "12 examples are too few for 7 users"),
        (small_calibration(12), {"num_users": 1}, "12 examples are too few for 1 users"),
        (small_calibration(12), {"passes": 0.0}, "passes must be at least"),
        (small_calibration(12), {"held_out": 0.6}, "held_out must be at most 0.5"),
        (small_calibration(12), {"start_rate": 1.5}, "start_rate must be at most 1"),
        (small_calibration(12), {"num_examples": 4}, "has no option 'num_examples'"),
    ],
)
def test_what_cannot_teach_is_refused_before_any_work(
    small: BaseModel, calibration: CalibrationSet, options: dict[str, Any], message: str
) -> None:
    def work(done: int, total: int) -> None:
        raise AssertionError("work was begun")

    with pytest.raises(InvalidInput, match=message):
        build_basis(small, method="population", rank=2, calibration=calibration, progress=work, **options)


@pytest.mark.parametrize("rate", ["core_rate", "basis_rate"])
def test_rates_that_make_the_loss_overflow_are_named(
    small: BaseModel, population: Population, rate: str
) -> None:
    options: dict[str, Any] = {"passes": 5.0, rate: 1e30}
    with pytest.raises(
        InvalidInput, match=r"failed at step \d+ of 40: .*smaller core_rate .*1e\+30"
    ) as caught:
        build_basis(small, method="population", rank=2, calibration=population, **options)
    assert caught.value.param == "core_rate"
