"""LoRA forms against a reference implementation that subtracts from W, and their results in the engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from tessera.chat.chat_format import EncodedExample
from tessera.errors import InvalidInput
from tessera.formats.adapter_ref import AdapterRef
from tessera.methods.bases import CalibrationSet, build_basis
from tessera.methods.building.hebbian import HebbianRule
from tessera.methods.building.losses import attached
from tessera.methods.forms import LORA_PRESETS
from tessera.methods.scaling import Scaling
from tessera.model.base_model import BaseModel
from tessera.queue.records import Job, JobSpec, JobStatus
from tests.service.engine.driver import Driver
from tests.trainer_worker.conftest import random_examples
from trainer_worker.data.training_data import TrainingData
from trainer_worker.outcome.payloads import adapter_metadata
from trainer_worker.training.lora.factors import LoraFactors, initial_factors
from trainer_worker.training.lora.linear import RowLinear
from trainer_worker.training.lora.single_adapter import METHOD, to_single_adapter
from trainer_worker.training.lora.trainer import LoraRun, LoraTrainer
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.run import RunResult

RANK = 4
#: One of every kind: random A, scaled, two rates, A frozen, subtracted, frozen and subtracted, from data.
KINDS = ("lora", "rslora", "lora_plus", "lora_fa", "pissa", "pissa_fa", "loram", "lora_one")
#: Forms that start one step away from the base model, as in their papers.
STEPPED = tuple(name for name in LORA_PRESETS if name.startswith(("lora_one", "lora_da")))


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return TrainingData(random_examples(1, 24), random_examples(2, 5), digest="lora")


@pytest.fixture(scope="module")
def calibration(data: TrainingData) -> CalibrationSet:
    return CalibrationSet.from_encoded(data.train)


def plan(**fields: Any) -> TrainingPlan:
    chosen = {"num_epochs": 1, "batch_size": 4, "total_steps": 5, "learning_rate": 1e-2, "seed": 3}
    return TrainingPlan(**{**chosen, "evaluate_every": 5, "max_grad_norm": 0.5, **fields})


def run_to_end(base: BaseModel, runs: list[LoraRun]) -> dict[str, list[float]]:
    """The training losses of each run."""
    trainer = LoraTrainer(base, runs, token_budget=10_000, min_tokens=10_000)
    losses: dict[str, list[float]] = {run.run_id: [] for run in runs}
    while not trainer.is_finished:
        for update in trainer.step():
            if update.train_loss is not None:
                losses[update.run_id].append(update.train_loss)
    return losses


def train_lora(
    base: BaseModel, data: TrainingData, plan: TrainingPlan, preset: str
) -> tuple[RunResult, LoraRun]:
    """Train one run to its end and return its result, as a job publishes it."""
    calibration = CalibrationSet.from_encoded(data.train)
    factors = initial_factors(base, preset, rank=RANK, calibration=calibration, seed=plan.seed)
    run = LoraRun("lora", data, plan, factors)
    run_to_end(base, [run])
    spec = JobSpec(adapter_id="ada", training_file="file-1", base_model=base.name, form="lora", method=preset)
    job = Job(
        job_id="ftjob-1", tenant="acme", spec=spec, status=JobStatus.RUNNING, created_at=0.0, started_at=0.0,
        finished_at=None, attempt=1, epoch=1, cost=1, progress={}, result=None, error=None,
        queue_position=None,
    )  # fmt: skip
    return run.to_result(base, adapter_metadata(run, job)), run


class ReferenceLora(nn.Module):
    """The reference implementation: W - s B_0 A_0 in the layer, A and B as parameters."""

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor, scale: float, factors: LoraFactors) -> None:
        super().__init__()
        offset = scale * B @ A if factors.preset.is_subtracted else 0.0
        self.weight = nn.Parameter(linear.weight.detach() - offset, requires_grad=False)
        self.A, self.B = nn.Parameter(A, requires_grad=factors.preset.trains_A), nn.Parameter(B)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.A), self.B)


def reference_losses(
    base: BaseModel, data: TrainingData, plan: TrainingPlan, initial: LoraFactors
) -> list[float]:
    """Losses of training with torch's own AdamW, one example at a time."""
    model = copy.deepcopy(base.model)
    layers = []
    for shape, A, B in zip(initial.modules, initial.A, initial.B, strict=True):
        parent, _, child = shape.name.rpartition(".")
        linear = model.get_submodule(shape.name)
        layer = ReferenceLora(linear, A.double(), B.double(), initial.scale, initial)
        setattr(model.get_submodule(parent), child, layer)
        layers.append(layer)
    trained = [[layer.B for layer in layers], [layer.A for layer in layers if layer.A.requires_grad]]
    groups = [{"params": params, "factor": factor} for params, factor in
              zip(trained, (initial.preset.b_rate, 1.0), strict=True) if params]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    losses = []
    for step in range(plan.total_steps):
        batch = data.batch(step, batch_size=plan.batch_size, seed=plan.seed)
        num_tokens = sum(example.num_loss_tokens for example in batch)
        loss = sum((summed_loss(model, example) for example in batch), torch.zeros(())) / num_tokens
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in trained for p in group], plan.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate_at(step) * group["factor"]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def summed_loss(model: nn.Module, example: EncodedExample) -> Tensor:
    ids = torch.tensor([example.token_ids])
    logp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return -sum(logp[i - 1, ids[0, i]] for i, learned in enumerate(example.loss_mask) if learned)


@pytest.mark.parametrize("name", KINDS)
def test_trains_as_the_paper_does(
    small: BaseModel, data: TrainingData, calibration: CalibrationSet, name: str
) -> None:
    factors = initial_factors(small, name, rank=RANK, calibration=calibration)
    expected = reference_losses(small, data, plan(), factors)
    got = run_to_end(small, [LoraRun(name, data, plan(), factors)])[name]
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["lora", "lora_plus", "pissa", "lora_one"])
def test_a_scale_of_the_job_is_that_of_the_whole_change(
    small: BaseModel, data: TrainingData, calibration: CalibrationSet, name: str
) -> None:
    """delta_W = s (B A - B_0 A_0) for every form; s B_0 A_0 stays what it is."""
    plain = initial_factors(small, name, rank=RANK, calibration=calibration)
    factors = initial_factors(small, name, rank=RANK, calibration=calibration, scaling=Scaling(scale=3.0))
    by_option = initial_factors(small, name, rank=RANK, calibration=calibration, scale=3.0)

    assert (factors.scale, by_option.scale, factors.recipe["scale"]) == (3.0, 3.0, 3.0)
    for A, B, A0, B0, A1 in zip(factors.A, factors.B, plain.A, plain.B, by_option.A, strict=True):
        torch.testing.assert_close(3.0 * B @ A, plain.scale * B0 @ A0)
        assert torch.equal(A, A1)
    expected = reference_losses(small, data, plan(), factors)
    got = run_to_end(small, [LoraRun(name, data, plan(), factors)])[name]
    assert got == pytest.approx(expected, rel=1e-6)
    assert got != pytest.approx(reference_losses(small, data, plan(), plain), rel=1e-3)


@pytest.mark.parametrize("name", LORA_PRESETS)
def test_begins_at_the_base_model_and_is_stored_exactly(
    small: BaseModel, data: TrainingData, calibration: CalibrationSet, name: str
) -> None:
    """The subtracted product has no effect at the start, and the stored adapter equals the trained one."""
    run = LoraRun(name, data, plan(total_steps=3), initial_factors(
        small, name, rank=RANK, calibration=calibration))  # fmt: skip
    ids = torch.tensor([[5, 9, 2, 40, 77, 8]])
    bare = small.model(ids).logits
    assert_same_logits(small, run, ids)
    if name not in STEPPED:
        torch.testing.assert_close(trained_logits(small, run, ids), bare)
    run_to_end(small, [run])
    assert float((trained_logits(small, run, ids) - bare).abs().max()) > 1e-3
    assert_same_logits(small, run, ids)
    torch.testing.assert_close(small.model(ids).logits, bare, rtol=0, atol=0, msg="W has been written to")


def trained_logits(base: BaseModel, run: LoraRun, ids: Tensor) -> Tensor:
    """The factors in dense weights, in float64."""
    model = copy.deepcopy(base.model)
    factors = run.factors
    for (A, B), shape, A0, B0 in zip(run.trained(run.R), factors.modules, factors.A, factors.B, strict=True):
        change = B.detach().double() @ A.detach().double()
        if factors.preset.is_subtracted:
            change -= B0.double() @ A0.double()
        model.get_submodule(shape.name).weight.data += factors.scale * change
    logits: Tensor = model(ids).logits
    return logits


def assert_same_logits(base: BaseModel, run: LoraRun, ids: Tensor) -> None:
    stored = to_single_adapter(
        run.factors,
        run.trained(run.R),
        model_id=base.model_id,
        learning_rate=run.plan.learning_rate,
        metadata={},
    )
    assert stored.basis.rank == run.factors.preset.stored_rank(RANK)
    assert stored.basis.manifest.method == METHOD
    with attached(base, stored.basis, stored.adapter.R):
        served = base.model(ids).logits
    torch.testing.assert_close(served, trained_logits(base, run, ids), rtol=1e-4, atol=1e-4)


def test_co_training_changes_nothing(
    small: BaseModel, data: TrainingData, calibration: CalibrationSet
) -> None:
    """Runs with different forms, rates and seeds in one batch give the same results as each alone."""

    def make() -> list[LoraRun]:
        runs = []
        for index, name in enumerate(KINDS):
            factors = initial_factors(small, name, rank=RANK, calibration=calibration, seed=index)
            own = plan(learning_rate=3e-3 * (index + 1), seed=index, total_steps=2 + index % 3)
            runs.append(LoraRun(name, data, own, factors))
        return runs

    together = make()
    losses = run_to_end(small, together)
    for run, alone in zip(together, make(), strict=True):
        assert run_to_end(small, [alone])[alone.run_id] == pytest.approx(losses[run.run_id], rel=1e-9)
        torch.testing.assert_close(run.R, alone.R, rtol=1e-7, atol=1e-9, msg=run.run_id)
        assert run.progress.valid_loss == pytest.approx(alone.progress.valid_loss, rel=1e-9)


def test_a_passing_hebbian_rule_learns_from_its_own_tokens(small: BaseModel, data: TrainingData) -> None:
    """LoLoRA, algorithm 1: A follows the rule on the layer's inputs, without padding, and no gradient."""
    factors = initial_factors(small, "lolora", rank=RANK)
    run = LoraRun("online", data, plan(total_steps=1), factors)
    other = LoraRun(
        "other", data, plan(total_steps=1, seed=4), initial_factors(small, "lolora_ae", rank=RANK)
    )
    first = factors.modules[0]
    seen: list[Tensor] = []
    hook = small.model.get_submodule(first.name).register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].detach())
    )
    batch = [row for sample in run.next_batch() for row in sample.rows]
    with torch.no_grad():
        for example in batch:
            small.model(torch.tensor([example.token_ids]))
    hook.remove()
    assert factors.online is not None
    rule = HebbianRule(first.d_in, RANK, factors.online, generator=torch.Generator())
    rule.A = factors.A[0].clone()
    # B is zero in the first step, so the inputs are those of the base model; long rows come first.
    rule.step(torch.cat(sorted((x[0].float() for x in seen), key=len, reverse=True)))
    run_to_end(small, [run, other])
    A, B = run.trained(run.R)[0]
    torch.testing.assert_close(A.float(), rule.A, rtol=1e-4, atol=1e-5)
    assert float(B.abs().max()) > 0
    moved = other.trained(other.R)[0][0] - other.factors.A[0]
    assert float(moved.abs().max()) > 0


def test_the_local_rule_has_a_rate_of_its_own(small: BaseModel, data: TrainingData) -> None:
    """Adam's first step moves every entry of A by its rate, whatever the rate of B."""
    ended = {}
    for rate, b_rate in ((None, 1e-3), (1e-4, 1e-3), (1e-4, 1e-2)):
        options = {} if rate is None else {"a_learning_rate": rate}
        factors = initial_factors(small, "lolora", rank=RANK, **options)
        assert factors.recipe["a_learning_rate"] == (rate or 1.5e-3)
        run = LoraRun("online", data, plan(total_steps=1, learning_rate=b_rate), factors)
        run_to_end(small, [run])
        ended[rate, b_rate] = run.trained(run.R)
        for (A, _), A0 in zip(ended[rate, b_rate], factors.A, strict=True):
            moved = (A - A0).abs()
            assert float(moved.median()) == pytest.approx(rate or 1.5e-3, rel=1e-2)
    for one, other in zip(ended[None, 1e-3], ended[1e-4, 1e-3], strict=True):
        assert torch.equal(one[1], other[1]), "B has learned the same: A changes after it was used"
    for one, other in zip(ended[1e-4, 1e-3], ended[1e-4, 1e-2], strict=True):
        assert torch.equal(one[0], other[0])
        assert not torch.equal(one[1], other[1])


def test_lolora_may_begin_at_evas_components(small: BaseModel, data: TrainingData) -> None:
    examples = CalibrationSet.from_encoded(data.train)
    factors = initial_factors(small, "lolora_eva", rank=RANK, calibration=examples, a_learning_rate=1e-4)
    eva = build_basis(small, method="eva", rank=RANK, calibration=examples)

    for A0, B0, A in zip(factors.A, factors.B, eva.A, strict=True):
        torch.testing.assert_close(A0, A.float(), rtol=0, atol=1e-6)
        assert not B0.any()
    run = LoraRun("online", data, plan(total_steps=1), factors)
    run_to_end(small, [run])
    assert float((run.trained(run.R)[0][0] - factors.A[0]).abs().median()) == pytest.approx(1e-4, rel=1e-2)


def test_evaluation_teaches_no_rule(small: BaseModel, data: TrainingData) -> None:
    run = LoraRun("online", data, plan(total_steps=1, evaluate_every=1), initial_factors(
        small, "lolora", rank=RANK))  # fmt: skip
    trainer = LoraTrainer(small, [run], token_budget=10_000)
    trainer.step()
    after_step = run.trained(run.R)[0][0].clone()
    trainer.step()  # the last evaluation
    assert run.is_finished
    learned = run.trained(run.R)[0][0]
    assert not torch.equal(learned, run.factors.A[0])
    with trainer.attached():
        pass
    assert torch.equal(learned, run.trained(run.R)[0][0])
    assert torch.equal(after_step, learned)


def test_row_linear_gradients() -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, X, rows = leaf(5, 3, 7), leaf(4, 2, 7), torch.tensor([2, 0, 2, 3, 0])
    expected = torch.stack([x[s] @ X[k].T for s, k in enumerate(rows.tolist())])
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    want = torch.autograd.grad((expected * weights).sum(), (x, X))
    y = RowLinear.apply(x, X, rows)
    got = torch.autograd.grad((y * weights).sum(), (x, X))
    torch.testing.assert_close(y, expected)
    for name, a, b in zip(("x", "X"), got, want, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_engine_serves_what_was_trained(small: BaseModel, data: TrainingData) -> None:
    """A basis of its own of rank 2 r and its adapter, through the engine's own path, in float32."""
    base = BaseModel(small.name, small.model_id, copy.deepcopy(small.model).float())
    stored, run = train_lora(base, data, plan(learning_rate=5e-2), "pissa")
    assert stored.own_basis is not None
    assert run.progress.valid_loss < run.progress.initial_valid_loss
    assert stored.adapter.metadata["preset"] == "pissa"
    merged = copy.deepcopy(base.model)
    for i, shape in enumerate(stored.own_basis.manifest.modules):
        change = stored.own_basis.B[i] @ stored.adapter.R[i] @ stored.own_basis.A[i]
        merged.get_submodule(shape.name).weight.data += change
    prompt = [5, 9, 2, 40]
    expected: list[int] = []
    while len(expected) < 12:
        expected.append(int(merged(torch.tensor([prompt + expected])).logits[0, -1].argmax()))
    engine = Engine(BaseModel(base.name, base.model_id, copy.deepcopy(base.model)), EngineConfig(num_slots=2))
    ref = AdapterRef("default", "mine", 1, stored.own_basis.basis_id)
    driver = Driver(engine, {ref: stored.adapter}, {stored.own_basis.basis_id: stored.own_basis})
    answer = driver.submit(prompt, adapter=ref)
    bare = driver.submit(prompt)
    driver.run()
    assert answer.token_ids == expected
    assert bare.token_ids != expected


def test_the_best_evaluation_is_what_is_published(small: BaseModel, data: TrainingData) -> None:
    wild = plan(learning_rate=3.0, max_grad_norm=100.0, evaluate_every=1, patience=2, total_steps=40)
    stored, run = train_lora(small, data, wild, "lora")
    assert run.progress.finish_reason == "early_stop"
    assert run.progress.best_valid_loss < run.progress.valid_loss
    assert stored.adapter.metadata["valid_loss"] == run.progress.best_valid_loss
    assert torch.equal(run.to_result(small, {}).adapter.R, stored.adapter.R)


def test_trained_parameters_are_counted(small: BaseModel) -> None:
    widths = [(shape.d_in, shape.d_out) for shape in initial_factors(small, "lora", rank=1).modules]
    both, only_B = (initial_factors(small, name, rank=RANK).num_trained for name in ("lora", "lora_fa"))
    assert both == RANK * sum(d_in + d_out for d_in, d_out in widths)
    assert only_B == RANK * sum(d_out for _, d_out in widths)


def test_bad_input_is_named_before_any_work(small: BaseModel, data: TrainingData) -> None:
    side = 12  # of k_proj and v_proj
    with pytest.raises(
        InvalidInput, match=rf"at most {side // 2} for pissa.*smaller side {side}.*k_proj"
    ) as e:
        initial_factors(small, "pissa", rank=side // 2 + 1)
    assert e.value.param == "rank"
    initial_factors(small, "lora", rank=side // 2 + 1)
    with pytest.raises(InvalidInput, match="unknown LoRA form 'dora'"):
        initial_factors(small, "dora", rank=2)
    with pytest.raises(InvalidInput, match="needs a calibration set of labelled examples"):
        initial_factors(small, "lora_da", rank=2)
    runs = [LoraRun(name, data, plan(), initial_factors(small, name, rank=2)) for name in ("lora", "lolora")]
    for pair in (runs, runs[::-1]):
        with pytest.raises(InvalidInput, match="with and without a local rule"):
            LoraTrainer(small, pair, token_budget=100)
    other = LoraRun("wide", data, plan(), initial_factors(small, "lora", rank=3))
    with pytest.raises(InvalidInput, match="same target modules and rank"):
        LoraTrainer(small, [runs[0], other], token_budget=100)
