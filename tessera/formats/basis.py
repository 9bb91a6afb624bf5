"""The basis: frozen factors A [r, d_in] and B [d_out, r] for every target module, shared by many adapters.

Canonical form: the rows of every A and the columns of every B are **orthonormal**. Any pair of frozen factors
A' = P_in A, B' = B P_out (QR) and any scale s give

    s B' R' A' = B (s P_out R' P_in) A = B R A,

so after training the methods differ only in their two orthonormal factors. While training they also differ in
the preconditioner (P_in, P_out): the trainer steps on R', and `fold` turns it into the R that is stored and
served. Scale, singular values and alpha / r never reach the serving path.

A basis is a stored, hashed artifact. Two runs of the same SVD may differ in half of the subspace. Therefore
an adapter carries the digest of its basis, and is refused in any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.errors import CorruptRecord, InvalidInput
from tessera.formats.adapter_ref import MAX_RANK
from tessera.formats.cores import FREE, CoreParametrization, FreeCores, OrthogonalCores, SpannedCores
from tessera.formats.manifest import FORMAT, ITEM_BYTES, BasisManifest, ModuleShape

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}


def storage_dtype(model_dtype: torch.dtype) -> str:
    """Return the 16-bit dtype in which a basis for a base model of this dtype is stored.

    Engine and trainer convert factors to the dtype of the model. So for a bfloat16 model, bfloat16 factors
    give the same numbers as float32 ones; rounding through float16 would change 6 % of them. All other models
    get float16, which changes B R A by 2.9e-4 of itself (bfloat16: 2.4e-3; storing R: 2.1e-4). This error
    matters only for a core that was made elsewhere, such as an initial one: training happens in the stored
    factors.
    """
    return "bfloat16" if model_dtype == torch.bfloat16 else "float16"


@dataclass(frozen=True)
class Basis:
    """A basis with its tensors, all on one device."""

    manifest: BasisManifest
    #: [r, d_in] for each module of the manifest, in its dtype.
    A: tuple[Tensor, ...]
    #: [d_out, r] for each module of the manifest, in its dtype.
    B: tuple[Tensor, ...]
    #: Training preconditioner, [M, r, r] float32.
    P_in: Tensor
    P_out: Tensor
    #: The stored core with which the training of a user best begins, [M, r, r] float32, if the method has
    #: learned one.
    start: Tensor | None = None
    #: The fixed matrices P of a spanned core (`cores.py`), [M, u, r, r] float32.
    projection: Tensor | None = None

    @cached_property
    def cores(self) -> CoreParametrization:
        """How the trained numbers of an adapter become its R, in float64. Raises `CorruptRecord`."""
        core, P_in, P_out = self.manifest.core, self.P_in.double(), self.P_out.double()
        match core:
            case {"kind": "free"}:
                return FreeCores(P_in, P_out)
            case {"kind": "spanned", "groups": groups} if self.projection is not None:
                directions = P_out[:, None] @ self.projection.double() @ P_in[:, None]
                return SpannedCores(directions, torch.tensor(groups))
            case {"kind": "orthogonal", "scales": scales, "terms": terms}:
                return OrthogonalCores(P_in, P_out, scales=scales, terms=terms)
        raise CorruptRecord(f"basis {self.basis_id} is for adapters that this build does not know: {core}")

    @property
    def basis_id(self) -> str:
        return self.manifest.basis_id

    @property
    def rank(self) -> int:
        return self.manifest.rank

    @property
    def num_modules(self) -> int:
        return len(self.manifest.modules)

    def fold(self, R: Tensor) -> Tensor:
        """Turn a trained core into a stored one: P_out @ R @ P_in. R: [..., M, r, r], on any device."""
        return self.P_out.to(R) @ R @ self.P_in.to(R)

    def unfold(self, R: Tensor) -> Tensor:
        """Invert `fold`: turn a stored core into a trained one (for a warm start). R: [..., M, r, r]."""
        halfway: Tensor = torch.linalg.solve(self.P_out.to(R), R)
        solved: Tensor = torch.linalg.solve(self.P_in.to(R), halfway, left=False)
        return solved

    def module_bytes(self) -> Iterator[bytes]:
        """Yield the raw bytes of A and then B for each module, as they are stored and hashed."""
        for A, B in zip(self.A, self.B, strict=True):
            yield raw_bytes(A) + raw_bytes(B)

    def preconditioner_bytes(self) -> bytes:
        """Return the raw bytes of P_in, P_out and, if there are any, of `start` and `projection`.

        Only training needs them, and adapters that are stored as their trained numbers.
        """
        more = b"".join(raw_bytes(X) for X in (self.start, self.projection) if X is not None)
        return raw_bytes(self.P_in) + raw_bytes(self.P_out) + more

    @classmethod
    def from_bytes(cls, manifest: BasisManifest, modules: list[bytes], preconditioner: bytes) -> Basis:
        """Rebuild a basis from stored bytes.

        Raises `CorruptRecord` unless they match the manifest's digest.
        """
        dtype, rank, M = DTYPES[manifest.dtype], manifest.rank, len(manifest.modules)
        A, B = [], []
        for shape, blob in zip(manifest.modules, modules, strict=True):
            if len(blob) != rank * (shape.d_in + shape.d_out) * dtype.itemsize:
                raise CorruptRecord(
                    f"the stored factors of {shape.name} have a wrong size, {len(blob)} bytes"
                )
            flat = torch.frombuffer(bytearray(blob), dtype=dtype)
            A.append(flat[: rank * shape.d_in].view(rank, shape.d_in))
            B.append(flat[rank * shape.d_in :].view(shape.d_out, rank))
        matrices, rest = M * rank * rank, manifest.projection_numbers
        if len(preconditioner) not in (4 * (2 * matrices + rest), 4 * (3 * matrices + rest)):
            raise CorruptRecord(f"the stored preconditioner has a wrong size, {len(preconditioner)} bytes")
        numbers = torch.frombuffer(bytearray(preconditioner), dtype=torch.float32)
        P = numbers[: len(numbers) - rest].view(-1, M, rank, rank)
        projection = numbers[len(numbers) - rest :].view(M, -1, rank, rank) if rest else None
        basis = cls(manifest, tuple(A), tuple(B), P[0], P[1], P[2] if len(P) == 3 else None, projection)
        if basis.digest() != manifest.basis_id:
            raise CorruptRecord(f"the stored factors do not match the digest of basis {manifest.basis_id}")
        return basis

    def digest(self) -> str:
        """Compute SHA-256 over the model id, the layout and the bytes of all tensors, as hex.

        How adapters are trained is part of it unless that is "free": some are stored as trained numbers.
        """
        manifest = self.manifest
        layout = [[m.name, m.d_in, m.d_out] for m in manifest.modules]
        parts = [FORMAT, manifest.model_id, manifest.rank, manifest.dtype, layout]
        if manifest.core["kind"] != FREE:
            parts.append(manifest.core)
        head = json.dumps(parts, sort_keys=True)
        digest = hashlib.sha256(head.encode())
        for blob in self.module_bytes():
            digest.update(blob)
        digest.update(self.preconditioner_bytes())
        return digest.hexdigest()


def make_basis(
    *,
    model_id: str,
    method: str,
    factors: dict[ModuleShape, tuple[Tensor, Tensor]],
    recipe: dict[str, Any],
    dtype: str = "float32",
    start: Tensor | None = None,
    core: Mapping[str, Any] | None = None,
    projection: Tensor | None = None,
    ranks: Sequence[int] | None = None,
) -> Basis:
    """Make a canonical basis from any frozen factors (A' [r, d_in], B' [d_out, r]) of each module.

    A' = P_in A and B' = B P_out are computed by QR in float64. The diagonals of the triangular factors are
    positive, so that factors that are orthonormal already come back unchanged but for rounding, with P the
    identity. If a module is too narrow for the rank (d = min(d_in, d_out) < r), all rows of A' and columns of
    B' after the first d must be zero, and stay zero. ranks: the same for modules with fewer than r.

    start: R'_0 [M, r, r] in the coordinates of these factors; the basis keeps it as P_out R'_0 P_in. core,
    projection: how adapters are trained, unless freely (`BasisManifest.core`, `Basis.projection`). Raises
    `InvalidInput` for a factor that is not finite or does not have full rank.
    """
    if core is not None:
        recipe = {**recipe, "core": dict(core)}
    if dtype not in DTYPES:
        raise InvalidInput(f"a basis can be stored as {', '.join(DTYPES)}, not as {dtype}", param="dtype")
    A, B, P_in, P_out = [], [], [], []
    for (module, (raw_A, raw_B)), own in zip(
        factors.items(), ranks or [MAX_RANK] * len(factors), strict=True
    ):
        width = min(len(raw_A), module.d_in, module.d_out, own)
        _check_factors(module, raw_A, raw_B, width)
        QA, LA = torch.linalg.qr(raw_A[:width].double().T)  # Aᵀ = Q L, so P_in = Lᵀ
        QB, LB = torch.linalg.qr(raw_B[:, :width].double())
        QA, LA = _positive_diagonal(QA, LA)
        QB, LB = _positive_diagonal(QB, LB)
        _check_rank(module, "A", LA)
        _check_rank(module, "B", LB)
        QA, QB = (F.pad(Q, (0, len(raw_A) - width)) for Q in (QA, QB))
        LA, LB = (_extend(L, len(raw_A)) for L in (LA, LB))
        A.append(QA.T.to(DTYPES[dtype]).contiguous().cpu())
        B.append(QB.to(DTYPES[dtype]).contiguous().cpu())
        P_in.append(LA.T.float().cpu())
        P_out.append(LB.float().cpu())
    manifest = BasisManifest(
        basis_id="", model_id=model_id, method=method, rank=A[0].shape[0], dtype=dtype,
        modules=tuple(factors), recipe=recipe,
    )  # fmt: skip
    draft = Basis(
        manifest, tuple(A), tuple(B), torch.stack(P_in), torch.stack(P_out),
        projection=None if projection is None else projection.float().contiguous().cpu(),
    )  # fmt: skip
    if start is not None:
        draft = replace(draft, start=draft.fold(start.cpu().double()).float().contiguous())
    return replace(draft, manifest=replace(manifest, basis_id=draft.digest()))


def canonical_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip each singular pair so that the entry of largest magnitude in every column of U is positive.

    U: [d_out, k], Vh: [k, d_in]. An SVD is unique only up to these signs; LAPACK's choice differs between
    builds, and an adapter served with other signs is garbage (its ΔW is wrong by 96 to 144 %).
    """
    pivot = U.abs().argmax(dim=0)
    signs = torch.sign(U.gather(0, pivot[None])[0])
    signs[signs == 0] = 1
    return U * signs, Vh * signs[:, None]


def raw_bytes(tensor: Tensor) -> bytes:
    """Return the numbers of the tensor as bytes, row-major and little-endian."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _positive_diagonal(Q: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """Make the diagonal positive: QR is unique then, and leaves orthonormal input unchanged."""
    signs = torch.sign(torch.diagonal(L))
    signs[signs == 0] = 1
    return Q * signs, L * signs[:, None]


def _extend(L: Tensor, rank: int) -> Tensor:
    """Extend L to [rank, rank] with ones on the rest of the diagonal, so that it stays invertible."""
    whole = torch.eye(rank, dtype=L.dtype, device=L.device)
    whole[: len(L), : len(L)] = L
    return whole


def _check_factors(module: ModuleShape, A: Tensor, B: Tensor, width: int) -> None:
    rank = A.shape[0]
    if A.shape != (rank, module.d_in) or B.shape != (module.d_out, rank):
        raise InvalidInput(
            f"factors of {module.name} are {list(A.shape)} and {list(B.shape)}, "
            f"expected [r, {module.d_in}] and [{module.d_out}, r]"
        )
    if bool(A[width:].any()) or bool(B[:, width:].any()):
        raise InvalidInput(
            f"rank {rank} exceeds the smaller side {width} of {module.name}",
            param="rank",
        )
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise InvalidInput(f"factors of {module.name} hold a value that is not finite")


def _check_rank(module: ModuleShape, factor: str, L: Tensor) -> None:
    diagonal = torch.diagonal(L).abs()
    if float(diagonal.min()) <= 1e-10 * float(diagonal.max()):
        raise InvalidInput(
            f"{factor} of {module.name} has linearly dependent vectors: its rank is below {len(L)}"
        )
