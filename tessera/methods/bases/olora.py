"""OLoRA (arXiv 2406.01775): a QR factorisation of W. Needs no data.

    W = Q R,   A' = R_{:r},   B' = Q_{:, :r}      (algorithm 1)

There is no pivoting: the first r *columns* of W span B, whatever they are. Signs are those of a positive
diagonal of R, which makes the factorisation unique; LAPACK's may differ per column, in both factors at
once.
"""

from __future__ import annotations

import torch

from tessera.methods.building.method import COMMON_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """A' [r, d_in] upper trapezoidal, B' [d_out, r] orthonormal."""
    Q, R = torch.linalg.qr(data.weight.double())
    signs = torch.sign(torch.diagonal(R))
    signs[signs == 0] = 1
    r = data.rank
    return ModuleFactors((R * signs[:, None])[:r], (Q * signs)[:, :r])


METHOD = Method(
    name="olora",
    description="a QR factorisation of each weight",
    paper="OLoRA, arXiv 2406.01775, algorithm 1",
    factorise=factorise,
    options={name: COMMON_OPTIONS[name] for name in ("scale", "seed", "svd")},
)
