"""Local learning rules for A, which learn from the inputs as they pass by, without labels or gradients.

These are the rules of LoLoRA ("Locally fine-tuned low rank adapters"), algorithm 1. For a batch z [T, d_in],
centred by a running mean (μ ← 0.98 μ + 0.02 mean z, where the first μ is the first batch's mean), with
u = z Aᵀ [T, r] and e = z - u A, a *minimising* Adam gets

    hpca      g = -(1/T) uᵀ e                              Oja's subspace rule (SNL)
    ae        g = -(1/T) (uᵀ e + (e Aᵀ)ᵀ z)                 the gradient of ½ E‖z - AᵀA z‖²
    softhebb  g = -ΔA / max|ΔA|,  ΔA = yᵀ z - diag(Σ_t y∘u) A,  y = softmax(u), negated for all but the winner
    softhebb_plain  g = -(1/T) ΔA with the same ΔA, but y = softmax(u) as it is

The paper's theory uses the *uncentred* second moment (theorem 4.4) while its algorithm centres. For inputs
with a mean, the uncentred rule spends one direction on that mean.

LoLoRA cites SoftHebb from Moraitis et al. 2022, whose rule is Δa_k = η y_k (z - u_k a_k) with y = softmax(u):
`softhebb_plain`. The sign of the losers and the division by the maximum come from the later code of that
group, for "Hebbian Deep Learning Without Feedback" (2023): `softhebb`. LoLoRA gives neither the variant nor
the temperature; we use 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.errors import InvalidInput

#: Adam on A.
BETAS = (0.9, 0.999)
EPSILON = 1e-8
#: The local rules by name.
RULES = ("hpca", "ae", "softhebb", "softhebb_plain")


@dataclass(frozen=True)
class HebbianConfig:
    """The rule by which A learns from its inputs."""

    #: One of `RULES`.
    rule: str = "hpca"
    #: Adam's learning rate.
    lr: float = 1.5e-3
    #: Momentum of the running mean of the inputs.
    momentum: float = 0.98
    #: Whether the running mean is subtracted.
    is_centred: bool = True
    #: Whether A is initialized with the principal components of the first batch instead of random rows.
    svd_first: bool = False
    #: Tokens of one update, about.
    tokens_per_step: int = 512


class HebbianRule:
    """Learns A [r, d_in] online. `A` is never part of an autograd graph."""

    def __init__(self, width: int, rank: int, config: HebbianConfig, *, generator: torch.Generator) -> None:
        self.config = config
        uniform = 2 * torch.rand(rank, width, generator=generator) - 1
        self.A = uniform / width**0.5  # Kaiming uniform with a = √5, like lora_A in LoRA
        self.mean: Tensor | None = None
        self.num_steps = 0
        self._moment1 = torch.zeros_like(self.A)
        self._moment2 = torch.zeros_like(self.A)

    def state(self) -> dict[str, Tensor]:
        """Return everything but `A`, on the CPU, for a checkpoint."""
        state = {"moment1": self._moment1, "moment2": self._moment2}
        state["num_steps"] = torch.tensor(self.num_steps)
        if self.mean is not None:
            state["mean"] = self.mean
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned. Raises `KeyError` or `ValueError` for the state of another rule."""
        if any(state[name].shape != self.A.shape for name in ("moment1", "moment2")):
            raise ValueError("the moments have another shape")
        self._moment1, self._moment2 = state["moment1"], state["moment2"]
        self.num_steps, self.mean = int(state["num_steps"]), state.get("mean")

    @torch.no_grad()
    def observe(self, x: Tensor, lengths: Sequence[int] = ()) -> None:
        """Learn from x [T, d_in], in steps of about equal size near `tokens_per_step`.

        Raises `InvalidInput` if `svd_first` is set and the first step has too few tokens for r directions.
        """
        num_steps = max(1, round(len(x) / self.config.tokens_per_step))
        for part in x.detach().tensor_split(num_steps):
            if len(part):
                self.step(part)

    @torch.no_grad()
    def step(self, z: Tensor) -> None:
        """One update of the running mean and of A from z [T, d_in]."""
        self.A, self._moment1, self._moment2 = (t.to(z) for t in (self.A, self._moment1, self._moment2))
        z = self._centre(z)
        if self.num_steps == 0 and self.config.svd_first:
            self._take_components(z)
        self.num_steps += 1
        self._adam(local_gradient(self.config.rule, self.A, z))

    def _centre(self, z: Tensor) -> Tensor:
        if not self.config.is_centred:
            return z
        mean, keep = z.mean(0), self.config.momentum
        self.mean = mean if self.mean is None else keep * self.mean.to(z) + (1 - keep) * mean
        return z - self.mean

    def _take_components(self, z: Tensor) -> None:
        """Initialize A with the principal components of the first batch."""
        if len(z) <= len(self.A):
            raise InvalidInput(
                f"the first batch holds {len(z)} tokens, too few for {len(self.A)} principal components",
                param="calibration",
                code="calibration_too_small",
            )
        found = torch.linalg.svd(z, full_matrices=False)[2][: len(self.A)]
        # Row-major, like an A that is read from a checkpoint, because the layout changes how products round.
        self.A = found.clone(memory_format=torch.contiguous_format)

    def _adam(self, g: Tensor) -> None:
        self._moment1 = BETAS[0] * self._moment1 + (1 - BETAS[0]) * g
        self._moment2 = BETAS[1] * self._moment2 + (1 - BETAS[1]) * g.square()
        first = self._moment1 / (1 - BETAS[0] ** self.num_steps)
        second = self._moment2 / (1 - BETAS[1] ** self.num_steps)
        self.A = self.A - self.config.lr * first / (second.sqrt() + EPSILON)


def local_gradient(rule: str, A: Tensor, z: Tensor) -> Tensor:
    """Return the rule's gradient g [r, d_in] (see above) for A [r, d_in] and z [T, d_in]."""
    u = z @ A.mT
    if rule in ("softhebb", "softhebb_plain"):
        y = F.softmax(u, dim=1)
        if rule == "softhebb":
            y = y * (2 * F.one_hot(y.argmax(1), len(A)).to(y) - 1)
        change = y.mT @ z - (y * u).sum(0)[:, None] * A
        size = change.abs().max().clamp_min(EPSILON) if rule == "softhebb" else len(z)
        return -change / size
    e = z - u @ A
    g = u.mT @ e
    if rule == "ae":
        g = g + (e @ A.mT).mT @ z
    return -g / len(z)


def online_delta(x: Tensor, rule: HebbianRule, B: Tensor) -> Tensor:
    """Return y[t] = B A x[t], and then let A learn from x (algorithm 1, in which B is trained).

    x: [T, d_in];  B: [d_out, r], trained;  y: [T, d_out]. Autograd keeps u = A x [T, r] and not x, and no
    gradient flows to x through A unless x requires one.
    """
    A = rule.A.to(x)
    u = x @ A.mT
    rule.observe(x)
    y: Tensor = u @ B.mT
    return y
