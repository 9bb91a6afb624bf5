"""The statistics that a method can ask a calibration pass for, and the ones that it gets for each module."""

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
    """The statistics that a method needs of its modules. If it needs none, there is no calibration pass."""

    #: Whether the weight's gradient is needed.
    gradient: bool = False
    #: Makes the rule for a module's inputs from the module's name and d_in.
    inputs: Callable[[str, int], InputRule] | None = None
    #: The tokens that the rule sees.
    input_tokens: Tokens = "all"
    #: How much of the second moment of the output gradients is needed.
    outputs: Literal["none", "diagonal", "full"] = "none"
    #: The loss of those gradients: the log-likelihood per token to learn, or (as in some authors' code) the
    #: mean loss over all tokens.
    output_units: Literal["token", "loss"] = "token"

    @property
    def labels(self) -> bool:
        """Whether a backward pass is needed, and therefore a loss."""
        return self.gradient or self.outputs != "none"

    @property
    def any(self) -> bool:
        return self.labels or self.inputs is not None

    def bytes_for(self, target: Target) -> int:
        """Return an upper bound on the bytes of one module's statistics; inputs count once per module."""
        d_in, d_out = target.shape.d_in, target.shape.d_out
        size = 4 * d_in * d_out if self.gradient else 0
        if self.inputs is not None:
            size += moment_bytes(d_in)
        return size + (moment_bytes(d_out) if self.outputs == "full" else 0)


@dataclass(frozen=True)
class Counts:
    """The size of the data that a calibration pass read, and of the set from which they were drawn."""

    num_examples: int = 0
    num_tokens: int = 0
    num_label_tokens: int = 0
    population_examples: int = 0
    population_label_tokens: int = 0


@dataclass
class Statistics:
    """The statistics of one module. Where memory is bounded, they can be used only once."""

    counts: Counts
    #: [d_out, d_in] float32, summed over the examples.
    gradient: Tensor | None = None
    #: The rule that has seen all inputs.
    inputs: InputRule | None = None
    #: The second moment of the output gradients: [d_out] (its diagonal) or [d_out, d_out].
    outputs: Tensor | None = None
    #: Memory that the factorisation may use beside these statistics; None: no bound.
    working_bytes: int | None = None

    def g(self) -> Tensor:
        """Return the summed gradient [d_out, d_in], which must not be overwritten."""
        assert self.gradient is not None, "the method's `Needs` does not include the gradient"
        return self.gradient

    def take_gradient(self) -> Tensor:
        """Return the summed gradient [d_out, d_in] in memory that the caller may overwrite."""
        g = self.g()
        if self.working_bytes is None:
            return g.clone()
        self.gradient = None
        return g

    def Y(self) -> Tensor:
        """Return the second moment of the output gradients, [d_out] or [d_out, d_out], in `output_units`."""
        assert self.outputs is not None, "the method's `Needs` does not include the output moment"
        return self.outputs
