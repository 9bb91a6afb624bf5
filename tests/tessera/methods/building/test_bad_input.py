"""Whatever is wrong with a request for a basis or a start is said by name and value, before work is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tessera.errors import BasisMismatch, InvalidInput, UnsupportedModel
from tessera.formats.adapter import Adapter
from tessera.methods.bases import METHODS, CalibrationSet, build_basis
from tessera.methods.init import INIT_METHODS, make_init
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import random_matrix, small_calibration, small_model, text_of

DATA_METHODS = sorted(name for name, method in METHODS.items() if method.needs_calibration != "none")
LABELLED = sorted(name for name, method in METHODS.items() if method.needs_calibration == "labelled")


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("rank", [0, -1, 17, True, 2.5])
def test_rank_out_of_range(small: BaseModel, calibration: CalibrationSet, method: str, rank: Any) -> None:
    with pytest.raises(InvalidInput, match=rf"k_proj; got {rank}|q_proj; got {rank}") as caught:
        build_basis(small, method=method, rank=rank, calibration=calibration)
    assert caught.value.param == "rank"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_matching_target_modules(small: BaseModel, calibration: CalibrationSet, method: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"no linear layer matches \['query'\].*down_proj"):
        build_basis(small, method=method, rank=2, target_modules=["query"], calibration=calibration)


@pytest.mark.parametrize("method", DATA_METHODS)
def test_missing_calibration(small: BaseModel, method: str) -> None:
    with pytest.raises(InvalidInput, match=f"{method} needs a calibration set") as caught:
        build_basis(small, method=method, rank=2)
    assert caught.value.param == "calibration"


@pytest.mark.parametrize("method", DATA_METHODS)
def test_calibration_too_small(small: BaseModel, method: str) -> None:
    tiny_set = CalibrationSet((((4, 5, 6), (False, True, True)),))
    with pytest.raises(InvalidInput, match="3 tokens, too few for rank 8") as caught:
        build_basis(small, method=method, rank=8, calibration=tiny_set)
    assert caught.value.code == "calibration_too_small"


@pytest.mark.parametrize("method", LABELLED)
def test_unlabelled_calibration(small: BaseModel, calibration: CalibrationSet, method: str) -> None:
    with pytest.raises(InvalidInput, match="token to learn") as caught:
        build_basis(small, method=method, rank=2, calibration=text_of(calibration))
    assert caught.value.code == "unlabelled_calibration"


@pytest.mark.parametrize("options", [{"output_rule": "grad"}, {"output_rule": "y"}, {"tokens": "label"}])
def test_text_methods_need_labels_for_some_options(
    small: BaseModel, calibration: CalibrationSet, options: dict[str, str]
) -> None:
    with pytest.raises(InvalidInput, match="token to learn"):
        build_basis(small, method="eva", rank=2, calibration=text_of(calibration), **options)


def test_too_little_data_for_the_rank_of_a_gradient(small: BaseModel) -> None:
    """Six tokens pass the count, but their gradient has rank six at most."""
    few = small_calibration(1, lengths=(6,))
    with pytest.raises(
        InvalidInput, match=r"gradient of model.layers.0.self_attn.q_proj has rank [0-5]"
    ) as caught:
        build_basis(small, method="gradient_svd", rank=5, calibration=few)
    assert caught.value.code == "rank_too_large"


def test_examples_that_the_model_cannot_read(small: BaseModel) -> None:
    long = small_calibration(2, lengths=(10, 65))
    with pytest.raises(InvalidInput, match="example 1 has 65 tokens, more than the 64"):
        build_basis(small, method="lora_sb", rank=2, calibration=long)
    for token in (97, -1):
        strange = CalibrationSet((((5, token, 7), (False, True, True)),))
        with pytest.raises(InvalidInput, match=f"example 0 holds token {token}, the vocabulary has 97"):
            build_basis(small, method="eva", rank=1, calibration=strange)


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf")])
@pytest.mark.parametrize("method", ["lora_xs", "lora_sb", "loram"])
def test_weights_that_are_not_finite(
    calibration: CalibrationSet, method: str, value: float, shown: str
) -> None:
    base = small_model()
    base.model.model.layers[1].mlp.up_proj.weight.data[3, 2] = value
    with pytest.raises(InvalidInput, match=rf"layers\.1\.mlp\.up_proj holds the value {shown}"):
        build_basis(base, method=method, rank=2, calibration=calibration)


@pytest.mark.parametrize("method", DATA_METHODS)
def test_losses_and_inputs_that_are_not_finite(calibration: CalibrationSet, method: str) -> None:
    """A broken norm, which no method looks at, shows in what passes through the target modules."""
    base = small_model()
    base.model.model.layers[1].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(
        InvalidInput, match=r"the loss of calibration example \d+ is nan|layers\.1\..* holds the value"
    ):
        build_basis(base, method=method, rank=2, calibration=calibration)


def test_gradients_that_are_not_finite_name_module_and_value(calibration: CalibrationSet) -> None:
    """A finite loss with a gradient that overflows: sqrt at 0, in front of layer 1."""

    class Square(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            return y + (y * 0).sum(-1, keepdim=True).abs().sqrt()

    base = small_model()
    base.model.model.layers[1].mlp.down_proj = Square(base.model.model.layers[1].mlp.down_proj)
    with pytest.raises(
        InvalidInput, match=r"the gradient of model\.layers\.0\.self_attn\.q_proj holds the value nan"
    ):
        build_basis(base, method="lora_sb", rank=2, calibration=calibration)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights(calibration: CalibrationSet, dtype: torch.dtype) -> None:
    base = small_model()
    linear = base.model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=rf"layers\.1\.mlp\.up_proj .*{dtype}"):
        build_basis(base, method="lora_xs", rank=2)


def test_tied_weights() -> None:
    base = small_model()
    layers = base.model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(
        UnsupportedModel, match=r"layers\.0\.mlp\.up_proj is tied to model\.layers\.1\.mlp\.up_proj"
    ):
        build_basis(base, method="lora_xs", rank=2)
    build_basis(base, method="lora_xs", rank=2, target_modules=["down_proj"])


def test_a_module_that_takes_no_part(calibration: CalibrationSet) -> None:
    base = small_model()
    base.model.model.layers[0].self_attn.spare_proj = nn.Linear(32, 32)
    with pytest.raises(InvalidInput, match="spare_proj took no part"):
        build_basis(
            base,
            method="eva",
            rank=2,
            target_modules=["spare_proj", "q_proj"],
            calibration=text_of(calibration),
        )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora_xs", {"top": True}, r"lora_xs has no option 'top'; its options: .*vectors, with_sigma"),
        ("lora_xs", {"vectors": "best"}, "vectors must be top, middle, bottom.*'best'"),
        ("lora_xs", {"with_sigma": 1}, "with_sigma must be a bool, got 1"),
        ("lora_xs", {"scale": 0.0}, "scale must be at least 1e-12, got 0"),
        ("lora_xs", {"scale": float("nan")}, "scale must be finite"),
        ("lora_xs", {"scale": 10**400}, "scale must be a float"),
        ("lora_xs", {"scale": "2"}, "scale must be a float, got '2'"),
        ("lora_xs", {"seed": None}, "seed must be a int, got None"),
        ("lora_sb", {"share": 1.5}, "share must be at most 1, got 1.5"),
        ("lora_da", {"mode": "paper"}, "mode must be consistent, repo"),
        ("lora_da", {"use_bias": False, "use_variance": False}, "nothing guides"),
        ("lora_da", {"population": 0}, "population must be at least 1"),
        ("lolora", {"rule": "oja"}, "rule must be hpca, ae, softhebb"),
        ("pca", {}, r"unknown method 'pca'; known: lora_xs, lora_sb"),
    ],
)
def test_options(
    small: BaseModel, calibration: CalibrationSet, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        build_basis(small, method=method, rank=2, calibration=calibration, **options)


def test_a_dtype_that_no_basis_has(small: BaseModel) -> None:
    with pytest.raises(InvalidInput, match="float32, bfloat16, float16, not as int8"):
        build_basis(small, dtype="int8")


def test_bad_input_costs_no_pass(calibration: CalibrationSet) -> None:
    base = small_model()
    passes: list[int] = []
    base.model.model.embed_tokens.register_forward_hook(lambda m, args, out: passes.append(1))
    for options in ({"rank": 17}, {"dtype": "int8"}, {"share": 2.0}, {"target_modules": ["none"]}):
        with pytest.raises(InvalidInput):
            build_basis(base, method="lora_sb", calibration=calibration, **{"rank": 2, **options})
    assert not passes


def test_starts(small: BaseModel, calibration: CalibrationSet) -> None:
    basis = build_basis(small, rank=4)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "cold"}, "unknown initialization 'cold'; known: zero, noise"),
        (
            {"method": "noise", "eta": 1.0},
            "initialization noise has no option 'eta'; its options: seed, sigma",
        ),
        ({"method": "noise", "sigma": -1.0}, "sigma must be at least 0"),
        ({"method": "warm"}, "needs an adapter"),
        ({"method": "sb_step"}, "needs the base model"),
        ({"method": "sb_step", "base": small}, "needs a calibration set of labelled"),
        ({"method": "sb_step", "base": small, "calibration": text_of(calibration)}, "token to learn"),
        ({"method": "sb_step", "eta_init": "value"}, "eta_init=value needs eta"),
        ({"method": "sb_step", "eta_init": "lr"}, "needs learning_rate"),
        ({"method": "sb_step", "eta_init": "first_warmup_step", "learning_rate": 1e-3}, "needs total_steps"),
    ]
    for arguments, message in cases:
        with pytest.raises(InvalidInput, match=message):
            make_init(basis, **arguments)
    with pytest.raises(InvalidInput, match=r"step of shape \[1, 2, 2\]"):
        make_init(basis, method="sb_step", step=torch.zeros(1, 2, 2), eta_init="value", eta=1.0)
    with pytest.raises(BasisMismatch, match="belongs to model"):
        make_init(basis, method="gradient", base=small_model(seed=1), calibration=calibration)
    step = torch.full((14, 4, 4), float("nan"))
    with pytest.raises(
        InvalidInput, match=r"initialization gradient of model.layers.0.self_attn.q_proj is not finite"
    ):
        make_init(basis, method="gradient", step=step, eta_init="value", eta=1.0)


def test_a_warm_start_from_too_far_away(small: BaseModel) -> None:
    old, new = (
        build_basis(small, method="random", rank=4),
        build_basis(small, method="random", rank=4, seed=1),
    )
    adapter = Adapter(old.basis_id, random_matrix(14, 4, 4, dtype=torch.float32))

    with pytest.raises(BasisMismatch, match="which is needed to move it"):
        make_init(new, method="warm", adapter=adapter)
    with pytest.raises(InvalidInput, match=r"loses 9\d\.\d% of it; 50.0% is allowed"):
        make_init(new, method="warm", adapter=adapter, adapter_basis=old)
    assert set(INIT_METHODS) == {"zero", "noise", "sb_step", "da_step", "gradient", "population", "warm"}
