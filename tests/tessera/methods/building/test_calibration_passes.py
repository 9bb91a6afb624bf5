"""A pass over calibration data leaves the model as it was, sees every token once."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tessera.chat.chat_format import EncodedExample
from tessera.defaults import LLAMA_LINEARS
from tessera.errors import InvalidInput, UnsupportedModel
from tessera.formats.manifest import ModuleShape
from tessera.methods.bases import METHODS, CalibrationSet, build_basis
from tessera.methods.building.activations import ScaledMoment, SecondMoment
from tessera.methods.building.collected import Needs
from tessera.methods.building.gradients import collect
from tessera.methods.building.losses import mean_loss
from tessera.methods.building.targets import Target, find_targets, layer_groups
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import random_matrix, small_calibration, small_model, text_of

TOKENS = torch.tensor([[5, 17, 44, 3, 80, 22, 9]])


def digest(model: nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class FailingRule:
    """An input rule that fails at the second batch."""

    def __init__(self) -> None:
        self.num_calls = 0

    def observe(self, x: Tensor, lengths: Sequence[int]) -> None:
        self.num_calls += 1
        if self.num_calls == 2:
            raise InvalidInput("the rule has failed")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_g5_building_leaves_the_model_as_it_was(calibration: CalibrationSet, method: str) -> None:
    base = small_model()
    base.model.train()
    base.model.lm_head.weight.requires_grad_()
    before, logits, hooks = digest(base.model), base.model(TOKENS).logits.detach(), num_hooks(base.model)

    build_basis(base, method=method, rank=4, calibration=calibration)

    assert digest(base.model) == before
    assert torch.equal(base.model(TOKENS).logits, logits)
    assert num_hooks(base.model) == hooks
    assert all(parameter.grad is None for parameter in base.model.parameters())
    trained = [name for name, parameter in base.model.named_parameters() if parameter.requires_grad]
    assert trained == ["lm_head.weight"]
    assert base.model.training


def test_a_failing_pass_leaves_no_hook_behind(calibration: CalibrationSet) -> None:
    base = small_model()
    targets = find_targets(base.model, LLAMA_LINEARS, 1)
    rule = FailingRule()
    with pytest.raises(InvalidInput, match="the rule has failed"):
        collect(base, targets, calibration, Needs(gradient=True, inputs=lambda name, width: rule))

    assert num_hooks(base.model) == 0
    assert not base.model(TOKENS).logits.requires_grad


def test_one_pass_per_group_and_no_more(calibration: CalibrationSet) -> None:
    """Issue 3: no more than one extra forward and backward pass over the set per layer group."""
    base = small_model(num_layers=3)
    seen: list[int] = []
    base.model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
    tokens_per_pass = sum(batch.token_ids.numel() for batch in calibration.batches())

    for method, chosen in METHODS.items():
        if chosen.refinement is not None:  # a learner goes over its data many times: it is no calibration
            continue
        seen.clear()
        build_basis(
            base,
            method=method,
            rank=4,
            calibration=calibration,
            **({"statistics_bytes": 1} if "statistics_bytes" in chosen.options else {}),
        )
        needs_data = chosen.needs_calibration != "none"
        assert sum(seen) == (3 * tokens_per_pass if needs_data else 0), method


def test_layer_groups_are_whole_layers_within_the_limit() -> None:
    linear = nn.Linear(2, 2)
    names = [f"model.layers.{layer}.{kind}" for layer in range(5) for kind in ("q", "k", "v")] + [
        "model.extra"
    ]
    targets = [Target(ModuleShape(name, 2, 2), linear) for name in names]
    sizes = [10] * len(targets)

    assert list(layer_groups(targets, sizes, 60)) == [range(0, 6), range(6, 12), range(12, 16)]
    assert list(layer_groups(targets, sizes, 1)) == [range(i, min(i + 3, 16)) for i in range(0, 16, 3)]
    assert list(layer_groups(targets, sizes, 10**9)) == [range(0, 16)]
    assert list(layer_groups([], [], 1)) == []


def test_a_pass_works_inside_no_grad_and_inference_mode(
    small: BaseModel, calibration: CalibrationSet
) -> None:
    targets = find_targets(small.model, ["v_proj"], 1)
    plain = collect(small, targets, calibration, Needs(gradient=True))[0].g()
    with torch.no_grad():
        assert torch.equal(collect(small, targets, calibration, Needs(gradient=True))[0].g(), plain)
    with torch.inference_mode():
        assert torch.equal(collect(small, targets, calibration, Needs(gradient=True))[0].g(), plain)


def test_half_precision_gradients_do_not_underflow() -> None:
    """Gradients of a mean loss in float16 are scaled up; without that, small ones are zero."""
    exact, half = small_model(), small_model(dtype=torch.float16)
    calibration = small_calibration(4)
    for base_gradient, half_gradient in zip(
        collect(exact, find_targets(exact.model, LLAMA_LINEARS, 1), calibration, Needs(gradient=True)),
        collect(half, find_targets(half.model, LLAMA_LINEARS, 1), calibration, Needs(gradient=True)),
        strict=True,
    ):
        a, b = base_gradient.g().flatten(), half_gradient.g().flatten()
        assert b.dtype == torch.float32
        assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.999


def test_padding_changes_nothing(small: BaseModel) -> None:
    """A batch of different lengths gives what its examples give one by one."""
    mixed = small_calibration(6, lengths=(12, 20))
    targets = find_targets(small.model, LLAMA_LINEARS, 1)
    needs = Needs(gradient=True, inputs=lambda name, width: ScaledMoment(width), outputs="diagonal")
    together = collect(small, targets, mixed, needs)
    assert max(batch.token_ids.shape[0] for batch in mixed.batches()) == 6

    alone = [collect(small, targets, CalibrationSet((example,)), needs) for example in mixed.examples]
    for i, statistics in enumerate(together):
        total = sum(part[i].g() for part in alone)
        scale = float(total.abs().max())
        torch.testing.assert_close(statistics.g() / scale, total / scale, rtol=0, atol=1e-5)
        rules = [part[i].inputs for part in alone]
        moment = sum(rule.moment for rule in rules if isinstance(rule, ScaledMoment)) / len(alone)
        assert isinstance(statistics.inputs, ScaledMoment)
        torch.testing.assert_close(statistics.inputs.moment, moment, rtol=1e-4, atol=1e-5)
        weights = [part[i].counts.num_label_tokens for part in alone]
        Y = sum(w * part[i].Y() for w, part in zip(weights, alone, strict=True)) / sum(weights)
        torch.testing.assert_close(statistics.Y(), Y, rtol=1e-3, atol=1e-8)
    losses = [mean_loss(small, CalibrationSet((example,))) for example in mixed.examples]
    assert mean_loss(small, mixed) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_label_tokens_only(small: BaseModel, calibration: CalibrationSet) -> None:
    targets = find_targets(small.model, ["q_proj"], 1)
    needs = Needs(inputs=lambda name, width: SecondMoment(width), input_tokens="label")
    rule = collect(small, targets, calibration, needs)[0].inputs

    assert isinstance(rule, SecondMoment)
    assert rule.num_tokens == calibration.num_label_tokens < calibration.num_tokens


def test_calibration_set_from_encoded_examples() -> None:
    encoded = [EncodedExample([1, 5, 6], [False, True, True]), EncodedExample([1, 7], [False, True])]
    data = CalibrationSet.from_encoded(encoded)

    assert (len(data), data.num_tokens, data.num_label_tokens) == (2, 5, 3)
    assert data.digest == CalibrationSet.from_encoded(copy.deepcopy(encoded)).digest
    assert data.digest != text_of(data).digest
    assert text_of(data).num_label_tokens == 0
    assert [batch.token_ids.tolist() for batch in data.batches()] == [[[1, 5, 6], [1, 7, 0]]]
    with pytest.raises(InvalidInput, match="empty"):
        CalibrationSet(())
    with pytest.raises(InvalidInput, match="example 0 has 2 tokens and a mask of 1"):
        CalibrationSet((((1, 2), (True,)),))


def test_batches_hold_every_example_once_within_the_budget() -> None:
    data = small_calibration(40, lengths=(3, 9, 30, 31, 60))
    batches = list(data.batches(max_tokens=100))

    assert sorted(index for batch in batches for index in batch.indices) == list(range(40))
    for batch in batches:
        assert batch.token_ids.numel() <= 100
        assert min(batch.lengths) >= 0.5 * max(batch.lengths)
        assert int(batch.valid.sum()) == sum(batch.lengths)
        for row, index in enumerate(batch.indices):
            ids, mask = data.examples[index]
            assert batch.token_ids[row, : len(ids)].tolist() == list(ids)
            assert batch.labels[row, 1 : len(ids)].tolist() == list(mask[1:])


def test_modules_that_do_not_take_one_vector_per_token_are_refused(calibration: CalibrationSet) -> None:
    class Pooling(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.pooled = inner, nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return y + self.pooled(x.mean(1))[:, None]

    base = small_model()
    layer = base.model.model.layers[1].self_attn
    layer.o_proj = Pooling(layer.o_proj)
    base.model.requires_grad_(False)
    with pytest.raises(UnsupportedModel, match=r"pooled receives \[.*32\] instead of one sequence per row"):
        build_basis(base, method="eva", rank=4, target_modules=["pooled"], calibration=text_of(calibration))


def test_gradients_of_a_matrix_alone() -> None:
    """The identity that everything here rests on: for y = W x, ∂L/∂W = δᵀ x."""
    x, W = random_matrix(9, 5), random_matrix(4, 5, seed=1).requires_grad_()
    y = x @ W.T
    y.retain_grad()
    y.square().sum().backward()

    assert y.grad is not None
    torch.testing.assert_close(W.grad, y.grad.T @ x)
