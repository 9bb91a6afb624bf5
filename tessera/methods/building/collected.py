"""What a method may ask of a calibration pass, and what it gets, per module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tessera.methods.building.activations import InputRule, moment_bytes
from tessera.methods.building.targets import Target

Tokens = Literal["all", "label"]


@dataclass(frozen=True)
class Needs:
    """What a method wants to know of its modules.

    inputs: makes the rule for a module from its name and d_in. input_tokens: which tokens it sees. outputs:
    the second moment of the output gradients; output_units: of the log-likelihood per token to learn, or
    (as some authors' code) of the mean loss over all tokens. A method that needs nothing runs without a
    calibration pass.
    """

    gradient: bool = False
    inputs: Callable[[str, int], InputRule] | None = None
    input_tokens: Tokens = "all"
    outputs: Literal["none", "diagonal", "full"] = "none"
    output_units: Literal["token", "loss"] = "token"

    @property
    def labels(self) -> bool:
        """Whether a backward pass, and so a loss, is needed."""
        return self.gradient or self.outputs != "none"

    @property
    def any(self) -> bool:
        return self.labels or self.inputs is not None

    def bytes_for(self, target: Target) -> int:
        """An upper bound of the memory of one module's statistics (inputs are counted once per module)."""
        d_in, d_out = target.shape.d_in, target.shape.d_out
        size = 4 * d_in * d_out if self.gradient else 0
        if self.inputs is not None:
            size += moment_bytes(d_in)
        return size + (moment_bytes(d_out) if self.outputs == "full" else 0)


@dataclass(frozen=True)
class Counts:
    """What a calibration pass saw, and (population) what the set it was drawn from holds."""

    num_examples: int = 0
    num_tokens: int = 0
    num_label_tokens: int = 0
    population_examples: int = 0
    population_label_tokens: int = 0


@dataclass
class Statistics:
    """What was collected for one module. gradient: [d_out, d_in] float32, the sum over examples.

    working_bytes: what its factorisation may use beside these, None for no bound. Where there is a bound they
    are for one use, and `take_gradient` gives away what it returns.
    """

    counts: Counts
    gradient: Tensor | None = None
    inputs: InputRule | None = None
    outputs: Tensor | None = None
    working_bytes: int | None = None

    def g(self) -> Tensor:
        """The summed gradient [d_out, d_in]."""
        assert self.gradient is not None, "the method did not say that it needs the gradient"
        return self.gradient

    def take_gradient(self) -> Tensor:
        """The summed gradient [d_out, d_in], to be overwritten."""
        g = self.g()
        if self.working_bytes is None:
            return g.clone()
        self.gradient = None
        return g

    def Y(self) -> Tensor:
        """The second moment of the output gradients, [d_out] or [d_out, d_out], in the units asked for."""
        assert self.outputs is not None, "the method did not say that it needs the output moment"
        return self.outputs
