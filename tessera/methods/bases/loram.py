"""LoRAM (The Primacy of Magnitude in Low-Rank Adaptation, arXiv 2507.06558): sines, scaled to the weight.

    A' = β Φ_in[:, :r]ᵀ,   B' = β Φ_out[:, :r],   β = (Q ν[W] / ν[Φ_out Φ_inᵀ])^{1/4}    (eqs 11 and 12,
                                                                                         algorithm 1)

Φ is the sine basis (`loram_sines.py`) and ν[X] = ‖X‖_F² / entries; since ν[Φ_out Φ_inᵀ] = r / (d_out d_in),
β² = √(Q / r) ‖W‖_F. Q = log r / log min(d_in, d_out), by default. Q(1) = 0 and nothing would train, so rank 1
is refused (rank 2 for log(r/2)). docs/methods.md says where Q comes from and what the option `rule` does.

Instead of a fit to PiSSA's, the magnitude may be that of another method's factors (`loram_reference.py`):
of their product (the paper's tracking mode), or of each factor, β_A² = ‖A_ref‖_F² / r and β_B alike.

Needs no data, except to track CorDA. Both factors are frozen here, unlike in the paper, so their subspace has
nothing to do with W or the data. What remains is a control basis that needs no storage, and a rule for the
magnitude, which is a scale in front of R. Under Adam it multiplies the learning rate and does nothing else
(proposition 1).

The store keeps only the manifest. Readers compute all tensors from it again (`regenerate`), bit for bit,
because the computation uses only integers and operations that IEEE 754 rounds correctly. If a machine
computes other bits all the same, the digest shows it; the option `store_factors` then stores the tensors as
for any other basis.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from tessera.errors import CorruptRecord, InvalidInput
from tessera.formats.basis import DTYPES, Basis
from tessera.formats.manifest import BasisManifest, ModuleShape
from tessera.methods.algebra.loram_sines import dst_columns
from tessera.methods.bases.loram_reference import REFERENCES, needs_of
from tessera.methods.building.collected import Needs
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.checks import LOG_FACTORS, check_loram, loram_needs_data, stores_loram
from tessera.methods.options import Option, Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A' = β_A Φ_inᵀ [r, d_in] and B' = β_B Φ_out [d_out, r]; β_A = β_B unless factors are tracked.

    The notes "s" and, where the factors differ, "ratio" are all that `regenerate` needs beside the shapes.
    """
    s, ratio = magnitude_scale(data, options)
    if not (math.isfinite(s) and s > 0):
        raise InvalidInput(
            f"the magnitude of {data.shape.name} is {s}, because its weight is zero", param="target_modules"
        )
    notes = {"s": s} if ratio is None else {"s": s, "ratio": ratio}
    beta_A, beta_B = _betas(s, ratio)
    A = dst_columns(data.shape.d_in, data.rank).mT * beta_A
    return ModuleFactors(A, dst_columns(data.shape.d_out, data.rank) * beta_B, notes=notes)


def magnitude_scale(data: ModuleData, options: Options) -> tuple[float, float | None]:
    """Return s = β_A β_B of one module, by `options["rule"]`, and β_A / β_B; None: the two are equal."""
    m, n, r = data.shape.d_out, data.shape.d_in, data.rank
    if options["rule"] == "none":
        return 1.0, None
    if options["magnitude"] == "tracking":
        found = REFERENCES[options["reference"]](data)
        if options["tracking"] == "factor":
            a, b = found.A / r, found.B / r  # β_A² and β_B²
            if options["rule"] == "factor":
                return math.sqrt(a * b), math.sqrt(a / b) if b > 0 else None
            return float((a * a * m + b * b * n) / r) ** 0.25, None
        energy = found.product
    else:
        square = float(torch.linalg.matrix_norm(data.weight.double())) ** 2  # ‖W‖_F²
        energy = square * log_share(r, min(m, n), options["magnitude"])
    if options["rule"] == "factor":
        return math.sqrt(energy / r), None
    return float((energy * (m + n) / r**2) ** 0.25), None


def _betas(s: float, ratio: float | None) -> tuple[float, float]:
    """Return β_A and β_B from the notes of a module."""
    if ratio is None:
        return math.sqrt(s), math.sqrt(s)
    return math.sqrt(s * ratio), math.sqrt(s / ratio)


def needs(rank: int, options: Options) -> Needs:
    """Return the statistics of the method that is tracked, if it needs any."""
    return needs_of(options["reference"], rank) if loram_needs_data(options) else Needs()


def log_share(rank: int, side: int, magnitude: str) -> float:
    """Return Q = log(c r) / log(side), at most 1, with c = 1/2, 1 or 2."""
    return min(1.0, math.log(LOG_FACTORS[magnitude] * rank) / math.log(side))


def regenerate(manifest: BasisManifest) -> Basis:
    """Compute a basis from its manifest alone, in the manifest's dtype, on the CPU.

    Raises `CorruptRecord` if the manifest is not one of LoRAM's, or if its digest is not that of the result.
    """
    try:
        notes = manifest.recipe["notes"]
        ratios = notes.get("ratio") or [None] * len(notes["s"])
        betas = [_betas(s, ratio) for s, ratio in zip(notes["s"], ratios, strict=True)]
        scale = float(manifest.recipe["options"]["scale"])
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CorruptRecord(
            f"the manifest of basis {manifest.basis_id} is not one of LoRAM's: {error}"
        ) from error
    if len(betas) != len(manifest.modules):
        raise CorruptRecord(
            f"the manifest of basis {manifest.basis_id} has {len(betas)} magnitudes for "
            f"{len(manifest.modules)} modules"
        )
    dtype = DTYPES[manifest.dtype]
    A = tuple(dst_columns(m.d_in, manifest.rank).mT.to(dtype).contiguous() for m in manifest.modules)
    B = tuple(dst_columns(m.d_out, manifest.rank).to(dtype) for m in manifest.modules)
    identity = torch.eye(manifest.rank).double()
    P_in, P_out = (beta[:, None, None] * identity for beta in torch.tensor(betas, dtype=torch.float64).T)
    basis = Basis(manifest, A, B, P_in.float(), (scale * P_out).float())
    if manifest.basis_id and basis.digest() != manifest.basis_id:
        raise CorruptRecord(
            f"basis {manifest.basis_id} was computed from its manifest and has other bytes: the manifest was "
            "changed, or this machine computes other bits than the one that built the basis; in that case "
            "build it with the option store_factors=true, which stores the factors"
        )
    return basis


def assemble(
    *,
    model_id: str,
    method: str,
    factors: dict[ModuleShape, tuple[Tensor, Tensor]],
    recipe: dict[str, Any],
    dtype: str,
) -> Basis:
    """Make the basis through `regenerate`, so that it has the same bytes later; no QR is needed."""
    is_regenerated = not recipe["options"]["store_factors"]
    draft = BasisManifest(
        basis_id="", model_id=model_id, method=method, rank=int(recipe["rank"]), dtype=dtype,
        modules=tuple(factors), recipe={**recipe, "is_regenerated": is_regenerated},
    )  # fmt: skip
    basis = regenerate(draft)
    return dataclasses.replace(basis, manifest=dataclasses.replace(draft, basis_id=basis.digest()))


METHOD = Method(
    name="loram",
    description="Sine factors, computed from the shapes alone and scaled by the norm of each weight",
    paper="LoRAM, arXiv 2507.06558, eqs 11-12 and algorithm 1",
    factorise=factorise,
    options={
        **DATA_OPTIONS,
        "rule": Option(
            "factor", "how the magnitude sets the scale s; none: s = 1", choices=("factor", "core", "none")
        ),
        "magnitude": Option(
            "log",
            "Q: log(r/2), log(r) or log(2r) over log min(d_in, d_out); tracking: another method's",
            choices=(*LOG_FACTORS, "tracking"),
        ),
        "reference": Option(
            "pissa",
            "the method that magnitude=tracking follows; corda needs text",
            choices=tuple(REFERENCES),
        ),
        "tracking": Option(
            "product",
            "what magnitude=tracking follows: the norm of B A, or those of A and of B",
            choices=("product", "factor"),
        ),
        "store_factors": Option(
            False, "store the factors too, for machines that compute other bits from the manifest"
        ),
    },
    needs=needs,
    check=check_loram,
    assemble=assemble,
    stores_factors=stores_loram,
)
