"""LoRAM ("The Primacy of Magnitude in Low-Rank Adaptation"): deterministic factors, scaled to the weight.

    A' = β Φ_in[:, :r]ᵀ,   B' = β Φ_out[:, :r],   β = (Q ν[W] / ν[Φ_out Φ_inᵀ])^{1/4}      (eqs 11, 12;
    algorithm 1)

Φ: the sine basis (`dst.py`); ν[X] = ‖X‖_F² / entries. As ν[Φ_out Φ_inᵀ] = r / (d_out d_in), β² = √(Q / r)
‖W‖_F. For Q the paper takes log r / log min(d_in, d_out), a fit to (Σ_{i≤r} s_i)² / (r Σ s_i²), what
PiSSA's factors have; its ablation log(r/2) and log(2r). It fits spectra like s_k ~ k^-0.5 and overestimates
flat ones. "tracking" takes the magnitude of another method's product instead, ν[B_ref A_ref].

Q(1) = 0: nothing would train, so rank 1 is refused (rank 2 for log(r/2)).

Both factors are frozen here, which the paper's are not: the subspace is then unrelated to W and data. What
stays is a control basis without storage, and a magnitude rule. The magnitude is a scale s in front of R:

    rule="factor"  s = β², the paper's factors as they are
    rule="core"    s = (Q (d_in + d_out) ν[W] d_in d_out / r²)^{1/4}: an SGD step of R then changes W as
    much as the
                   paper's step of A and B does (k_1 = Q (d_in + d_out) ν[W], eq. 10; ν[ΔW] = s⁴ r² γ /
                   (d_in d_out))
    rule="none"    s = 1

Under Adam s multiplies the learning rate and nothing else (proposition 1).

No storage: the store keeps the manifest, and readers make all tensors again from it (`regenerate`), bit for
bit: integers, and the operations that IEEE 754 rounds correctly. Where a machine gives other bits all the
same, the digest says so, and the option `store_factors` keeps the tensors like any other basis'.
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
from tessera.methods.bases.lora_xs import singular_triplets
from tessera.methods.building.dst import dst_columns
from tessera.methods.building.method import COMMON_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.checks import LOG_FACTORS, check_loram, stores_loram
from tessera.methods.options import Option, Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """A' = √s Φ_inᵀ [r, d_in], B' = √s Φ_out [d_out, r]; the note "s" is all that the manifest needs."""
    s = magnitude_scale(data, options)
    if not (math.isfinite(s) and s > 0):
        raise InvalidInput(
            f"the magnitude of {data.shape.name} is {s}: its weight is zero", param="target_modules"
        )
    root = math.sqrt(s)
    A = dst_columns(data.shape.d_in, data.rank).mT * root
    return ModuleFactors(A, dst_columns(data.shape.d_out, data.rank) * root, notes={"s": s})


def magnitude_scale(data: ModuleData, options: Options) -> float:
    """s of `options["rule"]` for one module."""
    m, n, r = data.shape.d_out, data.shape.d_in, data.rank
    if options["rule"] == "none":
        return 1.0
    square = float(torch.linalg.matrix_norm(data.weight.double())) ** 2  # ‖W‖_F²
    energy = _reference_energy(data, options) if options["magnitude"] == "tracking" else square * log_share(
        r, min(m, n), options["magnitude"]
    )  # fmt: skip
    if options["rule"] == "factor":
        return math.sqrt(energy / r)
    return float((energy * (m + n) / r**2) ** 0.25)


def log_share(rank: int, side: int, magnitude: str) -> float:
    """Q = log(c r) / log(side) with c = 1/2, 1 or 2, at most 1."""
    return min(1.0, math.log(LOG_FACTORS[magnitude] * rank) / math.log(side))


def regenerate(manifest: BasisManifest) -> Basis:
    """The basis from its manifest alone, in the manifest's dtype, on the CPU.

    Raises `CorruptRecord` if its bytes are not those that the manifest's digest is of.
    """
    try:
        roots = [math.sqrt(s) for s in manifest.recipe["notes"]["s"]]
        scale = float(manifest.recipe["options"]["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptRecord(
            f"the manifest of basis {manifest.basis_id} is none of LoRAM's: {error}"
        ) from error
    if len(roots) != len(manifest.modules):
        raise CorruptRecord(f"the manifest of basis {manifest.basis_id} holds {len(roots)} magnitudes")
    dtype = DTYPES[manifest.dtype]
    A = tuple(dst_columns(m.d_in, manifest.rank).mT.to(dtype).contiguous() for m in manifest.modules)
    B = tuple(dst_columns(m.d_out, manifest.rank).to(dtype) for m in manifest.modules)
    P = torch.tensor(roots, dtype=torch.float64)[:, None, None] * torch.eye(manifest.rank).double()
    basis = Basis(manifest, A, B, P.float(), (scale * P).float())
    if manifest.basis_id and basis.digest() != manifest.basis_id:
        raise CorruptRecord(
            f"made again from its manifest, basis {manifest.basis_id} has other bytes: the manifest was "
            "changed, or this machine computes other bits than the one that built it; for the latter build "
            "it with the option store_factors=true, which stores the factors"
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
    """The basis by way of its manifest, so that `regenerate` gives the same bytes, without a QR."""
    is_regenerated = not recipe["options"]["store_factors"]
    draft = BasisManifest(
        basis_id="", model_id=model_id, method=method, rank=int(recipe["rank"]), dtype=dtype,
        modules=tuple(factors), recipe={**recipe, "is_regenerated": is_regenerated},
    )  # fmt: skip
    basis = regenerate(draft)
    return dataclasses.replace(basis, manifest=dataclasses.replace(draft, basis_id=basis.digest()))


def _reference_energy(data: ModuleData, options: Options) -> float:
    """‖B_ref A_ref‖_F² of the method that is tracked."""
    if options["reference"] == "olora":
        return float(torch.linalg.qr(data.weight.double())[1][: data.rank].square().sum())
    which = "top" if options["reference"] == "pissa" else "bottom"
    return float(singular_triplets(data.weight, data, which=which)[1].square().sum())


METHOD = Method(
    name="loram",
    description="sine factors made from the shapes alone, scaled by the size of each weight",
    paper="LoRAM (The Primacy of Magnitude in Low-Rank Adaptation), eqs 11-12 and algorithm 1",
    factorise=factorise,
    options={
        **COMMON_OPTIONS,
        "rule": Option("factor", "what the magnitude does to s", choices=("factor", "core", "none")),
        "magnitude": Option(
            "log", "Q: log(r/2), log(r), log(2r), or another method's", choices=(*LOG_FACTORS, "tracking")
        ),
        "reference": Option("pissa", "what is tracked", choices=("pissa", "milora", "olora")),
        "store_factors": Option(
            False, "store the factors too, for machines that do not make the same bits of the manifest"
        ),
    },
    check=check_loram,
    assemble=assemble,
    stores_factors=stores_loram,
)
