"""Classifiers on encoders: equal to plain torch over transformers' own class, whatever the padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.formats.basis import Basis
from tessera.methods.bases import build_basis
from tessera.model.base_model import BaseModel, load_base_model
from tessera.model.encoders import ENCODERS
from tests.encoders import make_classifier
from tests.trainer_worker.training.classification.test_trainer import PlainAdapter
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.classification.data import LabelledData, LabelledRow
from trainer_worker.training.classification.run import ClassificationRun
from trainer_worker.training.plan import ADAM_BETAS, TrainingPlan

WIDTH, SCALE = 32, 3.0


def make_run(name: str, basis: Basis) -> ClassificationRun:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    rows = []
    for index in range(12):
        length = int(torch.randint(2, 20, (), generator=generator))
        ids = torch.randint(5, 99, (length,), generator=generator).tolist()
        first = length // 2 if index % 3 == 0 else 0
        rows.append(LabelledRow(ids, [False] * length, target=float(index % 3), first_length=first))
    data = TrainingData(tuple(rows[:9]), tuple(rows[9:]), digest=name)
    plan = TrainingPlan(
        num_epochs=2, batch_size=3, total_steps=6, learning_rate=1e-2, seed=3, max_grad_norm=None,
        patience=None,
    )  # fmt: skip
    return ClassificationRun(
        name, LabelledData(data, ("a", "b", "c")), plan, basis, width=WIDTH, head_rate=SCALE * 1e-2,
        trains_bias=True,
    )  # fmt: skip


@pytest.fixture(params=["bert", "roberta", "distilbert", "modernbert"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, BaseModel]:
    """transformers' own class in float64, and the same model as a base model."""
    own = make_classifier(request.param).double()
    own.save_pretrained(tmp_path)
    base = load_base_model(tmp_path, dtype="float32", device="cpu")
    base.model.double()
    return own, base


def test_a_run_equals_plain_torch(encoder: tuple[nn.Module, BaseModel]) -> None:
    own, base = encoder
    basis = build_basis(base, rank=4)
    run, other = make_run("x", basis), make_run("y", basis)
    plain = []
    for i, module in enumerate(basis.manifest.modules):
        parent, _, child = module.name.rpartition(".")
        A = basis.P_in[i].double() @ basis.A[i].double()
        B = basis.B[i].double() @ basis.P_out[i].double()
        adapter = PlainAdapter(own.get_submodule(module.name), A, B)  # type: ignore[arg-type]
        setattr(own.get_submodule(parent), child, adapter)
        plain.append(adapter)
    weight, bias = (nn.Parameter(torch.zeros(3, *size, dtype=torch.float64)) for size in ((WIDTH,), ()))
    architecture = ENCODERS[base.model.config.model_type]
    head = own.get_submodule(architecture.head)

    def loss_of(rows: list[LabelledRow]) -> Tensor:
        """One text at a time, and therefore without padding."""
        for name, value in (("weight", weight), ("bias", bias)):
            if hasattr(head, name):
                delattr(head, name)
            setattr(head, name, SCALE * value)
        losses = []
        for row in rows:
            ids = torch.tensor([row.token_ids])
            options = {"attention_mask": torch.ones_like(ids)}
            if architecture.has_token_types and row.first_length:
                options["token_type_ids"] = (torch.arange(ids.shape[1]) >= row.first_length).long()[None]
            losses.append(F.cross_entropy(own(ids, **options).logits, torch.tensor([int(row.target)])))
        return torch.stack(losses).mean()

    parameters = [*(adapter.R for adapter in plain), weight, bias]
    optimizer = torch.optim.AdamW(parameters, betas=ADAM_BETAS, weight_decay=0)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        batch = run.data.batch(step, batch_size=3, seed=3)
        loss = loss_of([row for row in batch if isinstance(row, LabelledRow)])
        loss.backward()
        optimizer.param_groups[0]["lr"] = run.plan.learning_rate_at(step)
        optimizer.step()
        losses.append(loss.item())

    trainer = run.make_trainer(base, max_runs=2, token_budget=64)
    trainer.join(other)  # whose texts are padded together with these
    updates = []
    while not run.is_finished:
        updates += trainer.step()
    got = [u.train_loss for u in updates if u.run_id == "x" and u.train_loss is not None]
    assert got == pytest.approx(losses, abs=1e-8)
    expected = torch.stack([adapter.R.detach() for adapter in plain])
    torch.testing.assert_close(run.R[: run.num_core].view(expected.shape), expected, atol=1e-8, rtol=1e-6)
    trained = run.R[run.num_core :].view(3, WIDTH + 1)
    torch.testing.assert_close(trained, torch.cat([weight, bias[:, None]], 1).detach(), atol=1e-8, rtol=1e-6)
