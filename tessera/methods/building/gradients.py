"""One calibration pass over a group of layers: weight gradients and activations in bounded memory.

For the target modules of the group, and for nothing else,

    g = Σ_examples δᵀ x,    δ = ∂L / ∂y [T, d_out],   x [T, d_in],   L = the example's mean loss

is summed in float32 as the gradients arrive. (LoRA-SB, arXiv 2411.19557, algorithm 1, also sums the gradients
of mean losses, but collects `p.grad` of *all* parameters in the model's dtype.) The autograd graph begins at
the group's first module: layers below it keep no activations, and layers above it only what a frozen layer
needs.

The model is left as it was, even if the pass fails: weights are never written, no parameter gets a gradient,
and all hooks are removed. Nobody else may use the model during the pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tessera.errors import InvalidInput, UnsupportedModel
from tessera.methods.building.activations import InputRule, OutputMoment, SecondMoment
from tessera.methods.building.calibration import CalibrationBatch, CalibrationSet
from tessera.methods.building.collected import Counts, Needs, Statistics
from tessera.methods.building.losses import example_losses, run_forward
from tessera.methods.building.memory_bound import MemoryBound
from tessera.methods.building.targets import Target
from tessera.model.base_model import BaseModel
from tessera.model.target_modules import by_sequence

#: In float16 the gradient of a mean loss underflows, so the loss is multiplied by this first.
LOSS_SCALE = {torch.float16: 2.0**12}


@torch.inference_mode(False)
def collect(
    base: BaseModel,
    targets: Sequence[Target],
    calibration: CalibrationSet,
    needs: Needs,
    *,
    population: CalibrationSet | None = None,
    bound: MemoryBound | None = None,
) -> list[Statistics]:
    """Return the statistics of each target, in order, from one pass over the calibration set.

    population: the set from which the calibration set was drawn. bound: records how many bytes of activations
    the model keeps. Raises `InvalidInput`, which names module and value, for a gradient or an input that is
    not finite.
    """
    counts = _counts(calibration, population or calibration)
    taps = [_Tap(target, needs, counts) for target in targets]
    shared = _SharedInputs()
    with frozen(base.model), _hooked(taps, shared):
        for batch in calibration.batches():
            _run(base, batch.to(base.device), taps, shared, backward=needs.labels, bound=bound)
    found = [tap.finish() for tap in taps]
    for statistics in found if bound is not None else ():
        if isinstance(statistics.inputs, SecondMoment):
            statistics.inputs.num_readers += 1
    return found


def _counts(calibration: CalibrationSet, population: CalibrationSet) -> Counts:
    return Counts(
        len(calibration),
        calibration.num_tokens,
        calibration.num_label_tokens,
        len(population),
        population.num_label_tokens,
    )


def _run(
    base: BaseModel,
    batch: CalibrationBatch,
    taps: Sequence[_Tap],
    shared: _SharedInputs,
    *,
    backward: bool,
    bound: MemoryBound | None,
) -> None:
    scale = LOSS_SCALE.get(base.model.dtype, 1.0)
    shared.begin()
    for tap in taps:
        tap.begin(batch, scale, backward=backward)
    with torch.set_grad_enabled(backward):
        if not backward:
            run_forward(base, batch)
            return
        with nullcontext() if bound is None else bound.measured(base.model):
            loss = example_losses(base, batch).sum()
        if not loss.requires_grad:
            raise UnsupportedModel(f"the loss does not depend on {taps[0].target.name}")
        torch.autograd.backward(loss * scale)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters and put the model into evaluation mode (no dropout), within this context."""
    was_trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = [module for module in model.modules() if module.training]
    for parameter in was_trained:
        parameter.requires_grad_(False)
    for module in was_training:
        module.training = False
    try:
        yield
    finally:
        for parameter in was_trained:
            parameter.requires_grad_(True)
        for module in was_training:
            module.training = True


@contextmanager
def _hooked(taps: Sequence[_Tap], shared: _SharedInputs) -> Iterator[None]:
    handles = [tap.target.linear.register_forward_hook(partial(tap.on_forward, shared)) for tap in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tap in taps:
            tap.end()


class _SharedInputs:
    """Finds the modules that read the very same tensor; they are called one after another and share a rule.

    The last input is kept until the next one arrives, so that no other tensor can get its address.
    """

    def __init__(self) -> None:
        self._leaders: dict[str, str] = {}
        self._last: Tensor | None = None
        self._last_version = 0
        self._last_leader = ""
        self._rules: dict[str, InputRule | None] = {}

    def begin(self) -> None:
        self._last = None

    def rule(self, tap: _Tap, x: Tensor) -> tuple[InputRule | None, bool]:
        """Return the module's rule, and whether this input is new to it.

        Raises `UnsupportedModel` if the module shares its input in some batches only.
        """
        name = tap.target.name
        last = self._last
        is_same = (
            last is not None
            and (x.data_ptr(), x.shape, x.stride()) == (last.data_ptr(), last.shape, last.stride())
            and x._version == self._last_version
        )
        leader = self._last_leader if is_same else name
        if self._leaders.setdefault(name, leader) != leader:
            raise UnsupportedModel(
                f"target module {name} reads the input of {self._leaders[name]} in some batches only",
                param="target_modules",
            )
        self._last, self._last_version, self._last_leader = x, x._version, leader
        if leader not in self._rules:
            self._rules[leader] = tap.make_rule()
        return self._rules[leader], not is_same


class _Tap:
    """The hooks of one target module, and the statistics that they collect."""

    def __init__(self, target: Target, needs: Needs, counts: Counts) -> None:
        self.target, self._needs = target, needs
        self._statistics = Statistics(counts)
        self._outputs: OutputMoment | None = None
        weight = target.weight
        if needs.gradient:
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            self._statistics.gradient = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        if needs.outputs != "none":
            self._outputs = OutputMoment(target.shape.d_out, diagonal=needs.outputs == "diagonal")
        self._num_calls = 0
        self._batch: CalibrationBatch | None = None
        self._backward = False
        self._scale = 1.0

    def make_rule(self) -> InputRule | None:
        make = self._needs.inputs
        return None if make is None else make(self.target.name, self.target.shape.d_in)

    def begin(self, batch: CalibrationBatch, scale: float, *, backward: bool) -> None:
        self._batch, self._scale, self._backward = batch, scale, backward

    def end(self) -> None:
        self._batch = None

    def on_forward(
        self, shared: _SharedInputs, module: nn.Module, inputs: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        """Show the input to its rule, and register `_on_gradient` for the gradient of the output."""
        assert self._batch is not None
        num_rows, length = self._batch.token_ids.shape
        x = by_sequence(inputs[0].detach(), num_rows, length, self.target.name)
        self._num_calls += 1
        if self._needs.inputs is not None:
            self._show(shared, x)
        if not self._backward:
            return None
        if not output.requires_grad:  # the first module of the group, where the graph begins
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        output.register_hook(partial(self._on_gradient, x))  # type: ignore[no-untyped-call]
        return output

    def _show(self, shared: _SharedInputs, x: Tensor) -> None:
        assert self._batch is not None
        rule, is_new = shared.rule(self, x)
        self._statistics.inputs = rule
        if rule is None or not is_new:
            return
        chosen = self._batch.labels if self._needs.input_tokens == "label" else self._batch.valid
        tokens = _wide(x.flatten(0, 1) if bool(chosen.all()) else x[chosen])
        _check_finite(tokens, f"the input of {self.target.name}")
        rule.observe(tokens, chosen.sum(1).tolist())

    def _on_gradient(self, x: Tensor, delta: Tensor) -> None:
        assert self._batch is not None
        delta = _wide(delta.detach()).reshape(*x.shape[:2], -1)
        if self._scale != 1:
            delta = delta / self._scale
        g = self._statistics.gradient
        if g is not None:
            g.addmm_(delta.flatten(0, 1).mT.to(g), x.flatten(0, 1).to(g))
        if self._outputs is not None:
            counts = self._batch.label_counts.to(delta)
            factors = counts if self._needs.output_units == "token" else torch.ones_like(counts)
            self._outputs.observe(
                (delta * factors[:, None, None]).flatten(0, 1)
            )  # the gradient of padding is 0

    def finish(self) -> Statistics:
        """Return the statistics. Raises `InvalidInput` if the module never ran, or if they are unusable."""
        name, statistics = self.target.name, self._statistics
        if not self._num_calls:
            raise InvalidInput(
                f"target module {name} took no part in the forward pass", param="target_modules"
            )
        if self._outputs is not None:
            counts = statistics.counts
            is_per_token = self._needs.output_units == "token"
            statistics.outputs = self._outputs.mean(
                counts.num_label_tokens if is_per_token else counts.num_tokens
            )
            _check_finite(statistics.outputs, f"the output gradient of {name}")
        if statistics.gradient is not None:
            _check_finite(statistics.gradient, f"the gradient of {name}")
            if not bool(statistics.gradient.any()):
                raise InvalidInput(f"the gradient of {name} is 0 on the calibration set", param="calibration")
        return statistics


def _check_finite(values: Tensor, what: str) -> None:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        raise InvalidInput(f"{what} holds the value {float(values[~finite][0])}", param="calibration")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
