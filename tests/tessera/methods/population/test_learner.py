"""How a population teaches: gradients, retractions, episodes, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from tessera.defaults import LLAMA_LINEARS
from tessera.errors import InvalidInput
from tessera.methods.bases import CalibrationSet, Population, build_basis
from tessera.methods.building.gradients import frozen
from tessera.methods.building.targets import Target, find_targets
from tessera.methods.population.factors import SharedFactors
from tessera.methods.population.learner import Learner, LearningPlan
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import orthonormal, random_matrix, small_calibration, small_model
from tests.tessera.methods.memory import peak_bytes

PLAN = LearningPlan(
    steps=8, episode_steps=4, num_slots=2, batch_size=3, core_rate=1e-2, basis_rate=1e-2, start_rate=0.5,
    retract_every=2,
)  # fmt: skip


def learner_in(
    base: BaseModel, plan: LearningPlan, *, dtype: torch.dtype = torch.float64
) -> tuple[Learner, list[Target]]:
    """With random factors, random cores and two users."""
    targets = find_targets(base.model, LLAMA_LINEARS, 3)
    factors = SharedFactors(
        targets,
        [
            (orthonormal(t.shape.d_in, 3, seed=2 * i).T, orthonormal(t.shape.d_out, 3, seed=2 * i + 1))
            for i, t in enumerate(targets)
        ],
        num_slots=plan.num_slots,
    )
    learner = Learner(base, factors, [small_calibration(3, seed=1), small_calibration(3, seed=2)], plan)
    with torch.no_grad():
        factors.core.copy_(0.2 * random_matrix(*factors.core.shape, seed=5, dtype=dtype))
        learner.start.copy_(0.2 * random_matrix(*learner.start.shape, seed=6, dtype=dtype))
    return learner, targets


def merged_loss(
    base: BaseModel,
    targets: list[Target],
    A: list[Tensor],
    B: list[Tensor],
    core: Tensor,
    user: CalibrationSet,
) -> Tensor:
    """The plain truth: weights W + B R A, one example at a time, the mean over all tokens to learn."""
    weights = {
        f"{target.name}.weight": target.weight + B[i] @ core[i] @ A[i] for i, target in enumerate(targets)
    }
    losses = []
    for ids, mask in user.examples:
        tokens = torch.tensor([ids])
        logits = functional_call(base.model, weights, (), {"input_ids": tokens, "use_cache": False}).logits
        learns = torch.tensor(mask[1:])
        losses.append(F.cross_entropy(logits[0, :-1][learns], tokens[0, 1:][learns], reduction="none"))
    return torch.cat(losses).mean()


def test_gradients_of_the_factors_are_those_of_the_merged_weights() -> None:
    """d/dA, d/dB and d/dR of all users' summed losses, against autograd in float64.

    To 1e-5 only: the model's own norms compute in float32.
    """
    base = small_model(dtype=torch.float64)
    learner, targets = learner_in(base, PLAN)  # three examples a user, in batches of three: all of them
    factors = learner.factors
    with frozen(base.model):
        mean = learner.add_gradients()

    A, B = ([X.detach().clone().requires_grad_() for X in side] for side in (factors.A, factors.B))
    core = factors.core.detach().clone().requires_grad_()
    users = [small_calibration(3, seed=1), small_calibration(3, seed=2)]
    seated = [0, 1] if learner.users_in_slots == [0, 1] else [1, 0]
    total = sum(
        (merged_loss(base, targets, A, B, core[:, slot], users[user]) for slot, user in enumerate(seated)),
        torch.zeros(()),
    )
    wanted = torch.autograd.grad(total, [*A, *B, core])

    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7}
    assert mean == pytest.approx(total.item() / 2, rel=1e-7)
    for i, target in enumerate(targets):
        for name, leaf, gradient in (("A", factors.A[i], wanted[i]), ("B", factors.B[i], wanted[i + len(A)])):
            torch.testing.assert_close(
                leaf.grad, gradient, **close, msg=lambda text, n=f"{target.name} {name}": f"{n}: {text}"
            )
    torch.testing.assert_close(factors.core_grad, wanted[-1], **close)


def test_a_retraction_changes_no_users_delta() -> None:
    learner, targets = learner_in(small_model(dtype=torch.float64), PLAN)
    factors = learner.factors
    with torch.no_grad():
        for i, X in enumerate([*factors.A, *factors.B]):
            X += 0.3 * random_matrix(*X.shape, seed=i)
    cores = torch.cat([factors.core.detach(), learner.start[:, None]], 1)
    before = [B @ cores[i] @ A for i, (A, B) in enumerate(zip(factors.A, factors.B, strict=True))]

    learner.retract()

    cores = torch.cat([factors.core.detach(), learner.start[:, None]], 1)
    identity = torch.eye(3, dtype=torch.float64)
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-12}
    for i in range(len(targets)):
        A, B = factors.A[i].detach(), factors.B[i].detach()
        torch.testing.assert_close(A @ A.T, identity, **close)
        torch.testing.assert_close(B.T @ B, identity, **close)
        torch.testing.assert_close(B @ cores[i] @ A, before[i].detach(), **close)


def test_dependent_vectors_are_refused() -> None:
    learner, _ = learner_in(small_model(dtype=torch.float64), PLAN)
    with torch.no_grad():
        learner.factors.B[3][:, 1] = 2 * learner.factors.B[3][:, 0]
    with pytest.raises(InvalidInput, match="dependent or not finite"):
        learner.retract()


def test_an_episode_ends_with_the_start_nearer_to_the_users_core() -> None:
    """Reptile: S moves by its rate; the next user begins with S and with empty moments."""
    base = small_model(dtype=torch.float64)
    plan = replace(PLAN, episode_steps=1, steps=1, basis_rate=0.0, start_rate=0.5)
    learner, _ = learner_in(base, replace(plan, num_slots=1))
    S = learner.start.clone()
    with frozen(base.model):
        learner.step(0.05)

    moved = learner.start - S
    core = learner.factors.core.detach()[:, 0]
    torch.testing.assert_close(core, learner.start)
    assert 0 < float(moved.norm()) < float(S.norm())
    assert torch.equal(learner.final_init(), learner.start)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_learning_needs_little_more_memory_than_training_lora() -> None:
    """A and B with gradient and moments, and activations, as LoRA of the same rank on the same batch.

    What comes on top are the users' cores, and copies of A and B.
    """
    users = Population.of([small_calibration(4, seed=seed, lengths=(64,)) for seed in range(4)])
    base = small_model(num_layers=3, hidden=96)
    learning = peak_bytes(
        lambda: build_basis(
            base, method="population", rank=8, calibration=users, passes=1.0, num_slots=4, batch_size=4
        )
    )
    model = peft.get_peft_model(
        small_model(num_layers=3, hidden=96).model, peft.LoraConfig(r=8, target_modules=list(LLAMA_LINEARS))
    )

    def train() -> None:
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for batch in CalibrationSet(users.examples).batches():
            labels = torch.where(batch.labels, batch.token_ids, -100)
            model(input_ids=batch.token_ids, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    core_bytes = 4 * 21 * 4 * 8 * 8
    factor_bytes = build_basis(base, method="random", rank=8).manifest.factor_bytes
    assert learning < peak_bytes(train) + 8 * core_bytes + 10 * factor_bytes
