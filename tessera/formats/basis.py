"""The basis: frozen factors A [r, d_in] and B [d_out, r] for every target module, shared by many adapters.

Canonical form: the rows of every A and the columns of every B are **orthonormal**. Any pair of frozen factors
A' = P_in A, B' = B P_out (QR) and any scale s give

    s B' R' A' = B (s P_out R' P_in) A = B R A,

so the methods differ, once trained, only in their two orthonormal factors. What they differ in while
training is the preconditioner (P_in, P_out): the trainer steps on R', and `fold` turns it into the R that is
stored and served. Scale, singular values and alpha / r never reach the serving path.

A basis is a stored, hashed artifact. Two runs of the same SVD may differ by half of the subspace, so an
adapter names the digest of its basis and is refused on any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.errors import CorruptRecord, InvalidInput
from tessera.formats.manifest import FORMAT, ITEM_BYTES, BasisManifest, ModuleShape

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}


def storage_dtype(model_dtype: torch.dtype) -> str:
    """Of the factors of a basis that adapters are trained in, for a base model of this dtype: 16 bits.

    Engine and trainer convert factors to the model's dtype, so a bfloat16 model works in bfloat16 ones as it
    would in float32 ones; by way of float16, 6 % of the numbers would be others. For any other model float16,
    which changes B R A by 2.9e-4 of itself (bfloat16 by 2.4e-3; R as it is stored by 2.1e-4). That is an
    error only for a core that comes from elsewhere, a start say: what is trained is trained in these factors.
    """
    return "bfloat16" if model_dtype == torch.bfloat16 else "float16"


@dataclass(frozen=True)
class Basis:
    """A basis with its tensors, all in the manifest's dtype on one device.

    A[i]: [r, d_in], B[i]: [d_out, r] for module i of the manifest. P_in, P_out: [M, r, r] float32, the
    training preconditioner. start: [M, r, r] float32, the stored core that the training of a user begins with
    best, where the method has learned one; else None.
    """

    manifest: BasisManifest
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    P_in: Tensor
    P_out: Tensor
    start: Tensor | None = None

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
        """P_out @ R @ P_in: from the trained core to the stored one. R: [..., M, r, r], any device."""
        return self.P_out.to(R) @ R @ self.P_in.to(R)

    def unfold(self, R: Tensor) -> Tensor:
        """The inverse of `fold`: from a stored core to the trained one (warm start). R: [..., M, r, r]."""
        halfway: Tensor = torch.linalg.solve(self.P_out.to(R), R)
        solved: Tensor = torch.linalg.solve(self.P_in.to(R), halfway, left=False)
        return solved

    def module_bytes(self) -> Iterator[bytes]:
        """Per module the raw bytes of A, then of B: what the store keeps and the digest covers."""
        for A, B in zip(self.A, self.B, strict=True):
            yield raw_bytes(A) + raw_bytes(B)

    def preconditioner_bytes(self) -> bytes:
        """P_in, P_out and, if there is one, the start: what only training needs."""
        start = b"" if self.start is None else raw_bytes(self.start)
        return raw_bytes(self.P_in) + raw_bytes(self.P_out) + start

    @classmethod
    def from_bytes(cls, manifest: BasisManifest, modules: list[bytes], preconditioner: bytes) -> Basis:
        """Rebuild from stored bytes. Raises `CorruptRecord` unless they give the manifest's digest."""
        dtype, rank, M = DTYPES[manifest.dtype], manifest.rank, len(manifest.modules)
        A, B = [], []
        for shape, blob in zip(manifest.modules, modules, strict=True):
            if len(blob) != rank * (shape.d_in + shape.d_out) * dtype.itemsize:
                raise CorruptRecord(f"factors of {shape.name} hold {len(blob)} bytes")
            flat = torch.frombuffer(bytearray(blob), dtype=dtype)
            A.append(flat[: rank * shape.d_in].view(rank, shape.d_in))
            B.append(flat[rank * shape.d_in :].view(shape.d_out, rank))
        if len(preconditioner) not in (2 * M * rank * rank * 4, 3 * M * rank * rank * 4):
            raise CorruptRecord(f"the preconditioner holds {len(preconditioner)} bytes")
        P = torch.frombuffer(bytearray(preconditioner), dtype=torch.float32).view(-1, M, rank, rank)
        basis = cls(manifest, tuple(A), tuple(B), P[0], P[1], P[2] if len(P) == 3 else None)
        if basis.digest() != manifest.basis_id:
            raise CorruptRecord(f"stored factors do not give basis {manifest.basis_id}")
        return basis

    def digest(self) -> str:
        """SHA-256 over the model id, the layout and the bytes of all tensors, as hex."""
        manifest = self.manifest
        layout = [[m.name, m.d_in, m.d_out] for m in manifest.modules]
        head = json.dumps([FORMAT, manifest.model_id, manifest.rank, manifest.dtype, layout])
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
) -> Basis:
    """A canonical basis from any frozen factors (A' [r, d_in], B' [d_out, r]) per module.

    start: R'_0 [M, r, r] in the coordinates of these factors, which the basis keeps as P_out R'_0 P_in.

    A' = P_in A and B' = B P_out by QR in float64; signs are canonical (`canonical_signs`), so equal subspaces
    give equal bytes. Factors that are orthonormal already come back unchanged but for rounding, with
    P = identity. Of a module that is too narrow for the rank (d = min(d_in, d_out) < r), all rows of A' and
    columns of B' after the first d must be zero, and stay so. Raises `InvalidInput` for a non-finite factor
    or one without full rank.
    """
    if dtype not in DTYPES:
        raise InvalidInput(f"a basis is stored as {', '.join(DTYPES)}, not as {dtype}", param="dtype")
    A, B, P_in, P_out = [], [], [], []
    for module, (raw_A, raw_B) in factors.items():
        _check_factors(module, raw_A, raw_B)
        room = min(len(raw_A), module.d_in, module.d_out)
        QA, LA = torch.linalg.qr(raw_A[:room].double().T)  # Aᵀ = Q L, so P_in = Lᵀ
        QB, LB = torch.linalg.qr(raw_B[:, :room].double())
        QA, LA = _positive_diagonal(QA, LA)
        QB, LB = _positive_diagonal(QB, LB)
        _check_rank(module, "A", LA)
        _check_rank(module, "B", LB)
        QA, QB = (F.pad(Q, (0, len(raw_A) - room)) for Q in (QA, QB))
        LA, LB = (_extend(L, len(raw_A)) for L in (LA, LB))
        A.append(QA.T.to(DTYPES[dtype]).contiguous().cpu())
        B.append(QB.to(DTYPES[dtype]).contiguous().cpu())
        P_in.append(LA.T.float().cpu())
        P_out.append(LB.float().cpu())
    manifest = BasisManifest(
        basis_id="", model_id=model_id, method=method, rank=A[0].shape[0], dtype=dtype,
        modules=tuple(factors), recipe=recipe,
    )  # fmt: skip
    draft = Basis(manifest, tuple(A), tuple(B), torch.stack(P_in), torch.stack(P_out))
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
    """The tensor's memory, row-major, little-endian."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _positive_diagonal(Q: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """QR with a positive diagonal is unique, and leaves orthonormal input as it is."""
    signs = torch.sign(torch.diagonal(L))
    signs[signs == 0] = 1
    return Q * signs, L * signs[:, None]


def _extend(L: Tensor, rank: int) -> Tensor:
    """L with ones on the rest of a diagonal of `rank` numbers, so that it stays invertible."""
    whole = torch.eye(rank, dtype=L.dtype, device=L.device)
    whole[: len(L), : len(L)] = L
    return whole


def _check_factors(module: ModuleShape, A: Tensor, B: Tensor) -> None:
    rank = A.shape[0]
    if A.shape != (rank, module.d_in) or B.shape != (module.d_out, rank):
        raise InvalidInput(
            f"factors of {module.name} are {list(A.shape)} and {list(B.shape)}, "
            f"expected [r, {module.d_in}] and [{module.d_out}, r]"
        )
    room = min(module.d_in, module.d_out)
    if bool(A[room:].any()) or bool(B[:, room:].any()):
        raise InvalidInput(
            f"rank {rank} exceeds the smaller side {room} of {module.name}",
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
