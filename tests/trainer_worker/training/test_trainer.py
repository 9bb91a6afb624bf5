"""The step of many users: equal to plain torch, independent of other users, harmless to the base model."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from benchmarks.architectures.tiny_models import build, make_config
from tessera.chat.chat_format import EncodedExample
from tessera.errors import BasisMismatch
from tessera.formats.basis import Basis
from tessera.methods.bases import build_basis
from tessera.model.base_model import BaseModel
from tests.trainer_worker.conftest import VOCABULARY, MakeRun, random_examples
from trainer_worker.data.training_data import TrainingData, micro_batches
from trainer_worker.training.plan import ADAM_BETAS
from trainer_worker.training.run import RunUpdate, TrainRun
from trainer_worker.training.trainer import CoreRun, Trainer, token_losses


def finish(trainer: Trainer, *runs: TrainRun) -> list[RunUpdate]:
    """Train until the runs have ended; returns all updates."""
    updates = []
    while not all(run.is_finished for run in runs):
        updates += trainer.step()
    return updates


def alone(small: BaseModel, basis: Basis, run: TrainRun) -> TrainRun:
    trainer = Trainer(small, basis, max_runs=1, token_budget=512)
    trainer.join(run)
    finish(trainer, run)
    left = trainer.leave(run.run_id)
    assert left is run
    return run


def plain_loss(model: PreTrainedModel, examples: Sequence[EncodedExample]) -> Tensor:
    """Mean loss of the learned tokens, one example at a time and therefore without padding."""
    losses = []
    for example in examples:
        ids, learned = torch.tensor(example.token_ids), torch.tensor(example.loss_mask)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits[:-1][learned[1:]], ids[1:][learned[1:]], reduction="none"))
    return torch.cat(losses).mean()


class PlainAdapter(nn.Module):
    """y = W x + B P_out R' P_in A x with R' as an ordinary parameter."""

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.linear, self.A, self.B = linear, A, B
        self.R = nn.Parameter(torch.zeros(A.shape[0], A.shape[0], dtype=A.dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + x @ self.A.T @ self.R.T @ self.B.T
        return y


def test_a_run_equals_plain_torch(small: BaseModel, small_basis: Basis, make_run: MakeRun) -> None:
    """This covers preconditioner, padding, loss, clipping, schedule and AdamW at once."""
    run = make_run("x", total_steps=7, warmup_steps=2, max_grad_norm=0.05, weight_decay=0.1, patience=None)
    model = copy.deepcopy(small.model)
    plain = []
    for i, module in enumerate(small_basis.manifest.modules):
        parent, _, child = module.name.rpartition(".")
        A = small_basis.P_in[i].double() @ small_basis.A[i].double()
        B = small_basis.B[i].double() @ small_basis.P_out[i].double()
        adapter = PlainAdapter(model.get_submodule(module.name), A, B)
        setattr(model.get_submodule(parent), child, adapter)
        plain.append(adapter)
    parameters = [adapter.R for adapter in plain]
    optimizer = torch.optim.AdamW(parameters, betas=ADAM_BETAS, weight_decay=0.1)
    losses = []
    for step in range(7):
        optimizer.zero_grad()
        loss = plain_loss(model, run.data.batch(step, batch_size=4, seed=3))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.param_groups[0]["lr"] = run.plan.learning_rate_at(step)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        valid_loss = plain_loss(model, run.data.valid).item()

    trainer = Trainer(small, small_basis, max_runs=2, token_budget=512)
    trainer.join(run)
    updates = finish(trainer, run)
    got = [update.train_loss for update in updates if update.train_loss is not None]
    assert got == pytest.approx(losses, abs=1e-9)
    torch.testing.assert_close(run.R, torch.stack([p.detach() for p in parameters]), atol=1e-9, rtol=1e-9)
    assert run.progress.valid_loss == pytest.approx(valid_loss, abs=1e-9)


def test_a_user_gets_the_same_alone_and_in_company(
    small: BaseModel, small_basis: Basis, make_run: MakeRun
) -> None:
    """The others have other data, batch sizes and lengths, and one of them joins in the middle."""
    plans: dict[str, dict[str, int]] = {
        "a": {"batch_size": 4, "total_steps": 9},
        "b": {"batch_size": 1, "total_steps": 4},
        "c": {"batch_size": 7, "total_steps": 12},
    }
    expected = {name: alone(small, small_basis, make_run(name, **plan)) for name, plan in plans.items()}
    runs = {name: make_run(name, **plan) for name, plan in plans.items()}
    trainer = Trainer(small, small_basis, max_runs=3, token_budget=64)
    trainer.join(runs["a"])
    trainer.join(runs["b"])
    for _ in range(3):
        trainer.step()
    trainer.join(runs["c"])
    finish(trainer, *runs.values())
    for name, run in runs.items():
        torch.testing.assert_close(run.R, expected[name].R, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(run.best_R, expected[name].best_R, atol=1e-12, rtol=1e-9)
        assert run.progress.trained_tokens == expected[name].progress.trained_tokens
        assert run.progress.best_valid_loss == pytest.approx(
            expected[name].progress.best_valid_loss, abs=1e-11
        )


def test_shared_experts_of_a_mixture_learn_for_each_user_alone(make_run: MakeRun) -> None:
    """Shared experts receive the tokens of all users in one flat tensor."""
    config = make_config("qwen2_moe", vocab_size=VOCABULARY, num_hidden_layers=2)
    model = build(config).double()
    model.set_experts_implementation("eager")  # the other implementations do not support float64
    base = BaseModel("mixture", "mixture", model)
    basis = build_basis(base, rank=4)
    assert any("shared_expert" in module.name for module in basis.manifest.modules)
    expected = {name: alone(base, basis, make_run(name, basis=basis, total_steps=3)) for name in "ab"}
    runs = {name: make_run(name, basis=basis, total_steps=3) for name in "ab"}
    trainer = Trainer(base, basis, max_runs=2, token_budget=512)
    for run in runs.values():
        trainer.join(run)
    finish(trainer, *runs.values())
    for name, run in runs.items():
        assert run.R.abs().amax((1, 2)).gt(0).all()
        torch.testing.assert_close(run.R, expected[name].R, atol=1e-7, rtol=1e-4)  # routed in float32

    merged = copy.deepcopy(base.model)
    folded = basis.fold(runs["a"].R.double())
    for i, module in enumerate(basis.manifest.modules):
        linear = merged.get_submodule(module.name)
        weight = linear.weight.data + basis.B[i].double() @ folded[i] @ basis.A[i].double()
        linear.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        assert plain_loss(merged, runs["a"].data.valid).item() == pytest.approx(
            runs["a"].progress.valid_loss, abs=1e-6
        )


def test_what_others_train_on_changes_not_one_bit(
    small: BaseModel, small_basis: Basis, make_run: MakeRun
) -> None:
    results = []
    for shift in (0, 1):
        mine, other = make_run("a"), make_run("b")
        moved = [
            dataclasses.replace(e, token_ids=[(t + shift) % VOCABULARY for t in e.token_ids])
            for e in other.data.train
        ]
        other.data = TrainingData(tuple(moved), other.data.valid, digest="moved")
        trainer = Trainer(small, small_basis, max_runs=2, token_budget=512)
        trainer.join(mine)
        trainer.join(other)
        finish(trainer, mine, other)
        results.append((mine.R, other.R))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])


def test_a_slot_keeps_no_trace_of_who_left(small: BaseModel, small_basis: Basis, make_run: MakeRun) -> None:
    trainer = Trainer(small, small_basis, max_runs=1, token_budget=512)
    first = make_run("first")
    trainer.join(first)
    trainer.step()
    assert trainer.leave("first") is first
    kept = first.R.clone()
    second = make_run("second")
    trainer.join(second)
    finish(trainer, second)
    assert torch.equal(second.R, alone(small, small_basis, make_run("second")).R)
    assert torch.equal(first.R, kept)
    assert trainer.leave("nobody") is None


def test_the_base_model_is_untouched(small: BaseModel, small_basis: Basis, make_run: MakeRun) -> None:
    def state() -> tuple[str, list[int]]:
        tensors = list(small.model.state_dict().values())
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
        return digest, [t.data_ptr() for t in tensors]

    ids = torch.arange(12)[None]
    before, logits = state(), small.model(ids).logits
    alone(small, small_basis, make_run("a"))
    assert state() == before
    assert torch.equal(small.model(ids).logits, logits)
    assert not any(parameter.requires_grad for parameter in small.model.parameters())


@pytest.mark.parametrize("token_budget", [1, 24, 10_000])
def test_the_token_budget_changes_only_rounding(
    small: BaseModel, small_basis: Basis, make_run: MakeRun, token_budget: int
) -> None:
    expected = alone(small, small_basis, make_run("a"))
    run = make_run("a")
    trainer = Trainer(small, small_basis, max_runs=1, token_budget=token_budget)
    trainer.join(run)
    finish(trainer, run)
    torch.testing.assert_close(run.R, expected.R, atol=1e-12, rtol=1e-9)


def test_a_run_that_diverges_fails_alone(small: BaseModel, small_basis: Basis, make_run: MakeRun) -> None:
    expected = alone(small, small_basis, make_run("good"))
    good, bad = make_run("good"), make_run("bad", learning_rate=1e300, patience=None)
    trainer = Trainer(small, small_basis, max_runs=2, token_budget=512)
    trainer.join(bad)
    trainer.join(good)
    updates = finish(trainer, good, bad)
    codes = [code for update in updates if update.run_id == "bad" for code, _ in update.warnings]
    assert codes == ["nonfinite_skipped", "nonfinite_rolled_back", "training_diverged"]
    assert bad.progress.finish_reason == "diverged"
    assert bad.progress.learning_rate_factor == 0.5
    assert not bad.best_R.any(), "the best was the base model itself"
    torch.testing.assert_close(good.R, expected.R, atol=1e-12, rtol=1e-9)


def test_evaluations_come_at_the_start_at_the_end_and_between(
    small: BaseModel, small_basis: Basis, make_run: MakeRun
) -> None:
    run = make_run("a", total_steps=8, evaluate_every=3, patience=None)
    trainer = Trainer(small, small_basis, max_runs=1, token_budget=512)
    trainer.join(run)
    updates = finish(trainer, run)
    assert [update.step for update in updates if update.valid_loss is not None] == [0, 3, 6, 8]
    assert [update.step for update in updates if update.train_loss is not None] == list(range(1, 9))
    assert [update.step for update in updates] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]
    assert updates[-1].finish_reason == "completed"
    losses = [update.valid_loss for update in updates if update.valid_loss is not None]
    assert run.progress.initial_valid_loss == losses[0]
    assert run.progress.best_valid_loss == min(losses)
    with torch.no_grad():
        base_loss = plain_loss(small.model, run.data.valid).item()
    assert losses[0] == pytest.approx(base_loss, abs=1e-9)


def test_without_validation_data_the_last_state_is_the_best(
    small: BaseModel, small_basis: Basis, make_run: MakeRun
) -> None:
    run = alone(small, small_basis, make_run("a", num_valid=0))
    assert torch.equal(run.best_R, run.R)
    assert run.R.any()
    assert run.progress.best_valid_loss is None
    assert run.progress.best_step == 9


def test_a_warm_start_begins_where_the_adapter_stands(
    small: BaseModel, small_basis: Basis, make_run: MakeRun
) -> None:
    first = alone(small, small_basis, make_run("a", patience=None))
    stored = small_basis.fold(first.R).float()
    template = make_run("a", total_steps=1)
    second = CoreRun("again", first.data, template.plan, small_basis, start=stored)
    torch.testing.assert_close(second.R, first.R.float(), atol=1e-5, rtol=1e-4)
    alone(small, small_basis, second)
    assert second.progress.initial_valid_loss == pytest.approx(first.progress.valid_loss, abs=1e-4)


def test_a_basis_of_another_model_is_refused(small: BaseModel, small_basis: Basis) -> None:
    other = BaseModel("other", "other-model", small.model)
    with pytest.raises(BasisMismatch):
        Trainer(other, small_basis, max_runs=1, token_budget=512)


def test_losses_of_a_model_with_soft_caps_are_the_models_own() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=1.0, final_logit_softcapping=2.0,
        sliding_window=4, query_pre_attn_scalar=8,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).double().eval().requires_grad_(False)
    examples = list(random_examples(5, 6))
    with torch.no_grad():
        expected = plain_loss(model, examples).item()
    pairs = [(i % 2, example) for i, example in enumerate(examples)]
    losses = torch.cat(
        [token_losses(model, batch)[0] for batch in micro_batches(pairs, token_budget=40, min_fill=0)]
    )
    assert losses.mean().item() == pytest.approx(expected, abs=1e-6)  # Gemma's norms are in float32
    assert len(losses) == sum(example.num_loss_tokens for example in examples)
