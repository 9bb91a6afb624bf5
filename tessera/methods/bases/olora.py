"""OLoRA (arXiv 2406.01775): a QR factorisation of W.

    W = Q R,   A' = R_{:r},   B' = Q_{:, :r}                                             (algorithm 1)

Needs no data. There is no pivoting, so B spans the first r *columns* of W, whatever they are. The paper takes
Q and R as the library returns them; LAPACK's signs may differ per column, in both factors at once. We choose
the signs that make R's diagonal positive, which makes the factorisation unique.
"""

from __future__ import annotations

import torch

from tessera.methods.building.method import COMMON_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A' [r, d_in], upper trapezoidal, and B' [d_out, r], orthonormal."""
    Q, R = torch.linalg.qr(data.weight.double())
    signs = torch.sign(torch.diagonal(R))
    signs[signs == 0] = 1
    r = data.rank
    return ModuleFactors((R * signs[:, None])[:r], (Q * signs)[:, :r])


METHOD = Method(
    name="olora",
    description="A QR factorisation of each weight",
    paper="OLoRA, arXiv 2406.01775, algorithm 1",
    factorise=factorise,
    options={name: COMMON_OPTIONS[name] for name in ("scale", "seed", "svd")},
)
