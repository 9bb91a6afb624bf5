"""One user's adapter: an `r × r` matrix for every target module, and its packed binary form.

An adapter is cached and moved to the GPU as one contiguous tensor `R [M, r, r]`, in the module order of the
basis manifest. Names and shapes are in the manifest once, not in a million adapters. All scalars of the
training methods (alpha / r, singular values, …) are folded into R when an adapter is made (`basis.py`), so
the delta needs no scale. R is stored too, unless it follows from fewer trained numbers (`cores.py`): then
those are stored, and R is made of them and of the basis when the adapter is read. An adapter that classifies
has a head as well (`head.py`).

The packed form is little-endian and fits one Redis string:

    offset  size  field
    0       4     magic  b"TSRA"
    4       2     format: 1, or 2 for an adapter with a classification head
    6       1     dtype code: 0 float32, 1 float16, 2 bfloat16, 3 int8 with one float32 scale per module
    7       1     flags: 1 if the payload holds the trained numbers instead of R, otherwise 0
    8       4     version of the adapter
    12      4     number of modules M
    16      4     rank r
    20      4     metadata length in bytes
    24      8     payload length in bytes
    32      32    basis digest (SHA-256)
    64      16    XXH3-128 over the header with this field zero, the metadata and the payload
    80      4     format 2: scores C of the head
    84      4     format 2: width d of the hidden state that the head reads
    88      40    zero
    128           metadata: UTF-8 JSON
                  payload: [float32 scales [M],] then R [M, r, r], or the trained numbers (never int8)
                  format 2: then the head, float32 [C, d + 1], whose last column is the bias

The payload starts at byte 128 + metadata length, and its length includes the head. An adapter without a head
is written in format 1, which all releases read; one that does not know format 2 refuses it by its number.
Because offsets are fixed, the store's scripts read the
checksum of a version with `GETRANGE`, without a parser. Nothing is ever pickled.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

from tessera.defaults import MAX_LABELS
from tessera.errors import AdapterReplaced, BasisMismatch, CorruptRecord, InvalidInput, NotFound
from tessera.formats.adapter_ref import ADAPTER_DTYPES, CHECKSUM, MAX_RANK, AdapterRef
from tessera.formats.cores import CoreParametrization
from tessera.formats.head import MAX_HEAD_WIDTH, METADATA_KEY, ClassificationHead, described_labels

MAGIC = b"TSRA"
FORMAT, FORMAT_WITH_HEAD = FORMATS = (1, 2)
HEADER_BYTES = 128
_HEADER = struct.Struct("<4sHBBIIIIQ32s16sII40x")
_NO_CHECKSUM = bytes(CHECKSUM.stop - CHECKSUM.start)
_DTYPES = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16, 3: torch.int8}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
DTYPE_NAMES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ADAPTER_DTYPES}

#: Larger adapters are refused before anything is allocated, as are ranks above MAX_RANK. 16,384 modules are
#: 2,340 layers of 7.
MAX_MODULES = 16_384
MAX_METADATA_BYTES = 64 * 1024
#: The flag of a payload of trained numbers.
TRAINED_NUMBERS = 1

assert _HEADER.size == HEADER_BYTES


def delta(x: Tensor, A: Tensor, R: Tensor, B: Tensor) -> Tensor:
    """Compute y[t] = B @ R @ A @ x[t], which one adapter adds to the output of one target module.

    x: [T, d_in];  A: [r, d_in];  R: [r, r];  B: [d_out, r];  returns [T, d_out] in x.dtype.
    Source: LoRA-XS (arXiv 2405.17604) eq. 2, with the scale folded into R.
    """
    return x @ A.T @ R.T @ B.T


@dataclass(frozen=True)
class Adapter:
    """R for every target module of one basis.

    Raises `InvalidInput` if R has another shape or dtype, or holds a value that is not finite.
    """

    basis_id: str
    #: [M, r, r] float32, contiguous, on the CPU, all values finite.
    R: Tensor
    #: A JSON object, such as the provenance of the training. Describes the head, if there is one.
    metadata: dict[str, Any] = field(default_factory=dict)
    #: For an adapter that classifies texts.
    head: ClassificationHead | None = None
    #: The trained numbers that R follows from, [*shape] of the basis' `cores`, if they are to be stored.
    trained: Tensor | None = None

    def __post_init__(self) -> None:
        if self.head is not None:
            described = {**self.metadata, METADATA_KEY: self.head.describe()}
            object.__setattr__(self, "metadata", described)
        shape = tuple(self.R.shape)
        if len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
            raise InvalidInput(f"R must be of shape [modules, rank, rank]; got {list(shape)}", param="R")
        if self.R.dtype != torch.float32:
            raise InvalidInput(f"R must be float32; got {self.R.dtype}", param="R")
        if not _is_all_finite(self.R):
            bad = int((~torch.isfinite(self.R)).flatten(1).any(1).nonzero()[0])
            raise InvalidInput(f"R of module {bad} holds a value that is not finite", param="R")

    @property
    def rank(self) -> int:
        return self.R.shape[1]

    @property
    def num_modules(self) -> int:
        return self.R.shape[0]

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which `to_bytes` stores the numbers: trained ones are too few for int8."""
        return torch.float16 if self.trained is not None and dtype == torch.int8 else dtype

    def to_bytes(self, *, version: int, dtype: torch.dtype = torch.float16) -> bytes:
        """Write the packed form. Raises `InvalidInput` if a value overflows `dtype`."""
        dtype, head = self.storage_dtype(dtype), self.head
        payload = _pack(self.R if self.trained is None else self.trained, dtype)
        if head is not None:
            payload += _raw(head.weight)
        metadata = json.dumps(self.metadata, separators=(",", ":"), allow_nan=False).encode()
        if len(metadata) > MAX_METADATA_BYTES:
            raise InvalidInput(
                f"the metadata has {len(metadata)} bytes; the limit is {MAX_METADATA_BYTES}",
                param="metadata",
            )
        header = bytearray(
            _HEADER.pack(
                MAGIC,
                FORMAT if head is None else FORMAT_WITH_HEAD,
                _DTYPE_CODES[dtype],
                0 if self.trained is None else TRAINED_NUMBERS,
                version,
                self.num_modules,
                self.rank,
                len(metadata),
                len(payload),
                bytes.fromhex(self.basis_id),
                _NO_CHECKSUM,
                0 if head is None else len(head.weight),
                0 if head is None else head.width,
            )
        )
        header[CHECKSUM] = _checksum(header, metadata + payload)
        return bytes(header) + metadata + payload

    @classmethod
    def from_bytes(
        cls, blob: bytes, *, basis_id: str | None = None, cores: CoreParametrization | None = None
    ) -> Adapter:
        """Read the packed form. With `basis_id`, refuse an adapter of another basis.

        cores: those of the basis (`Basis.cores`); needed if the adapter holds trained numbers
        (`holds_trained_numbers`). Raises `BasisMismatch`, `InvalidInput` without `cores` where they are
        needed, and `CorruptRecord` for anything but the exact bytes that `to_bytes` wrote.
        """
        header = read_header(blob)
        if basis_id is not None and header.basis_id != basis_id:
            raise BasisMismatch(f"the adapter belongs to basis {header.basis_id}, not to {basis_id}")
        body = memoryview(blob)[HEADER_BYTES:]
        if len(body) != header.metadata_bytes + header.payload_bytes:
            raise CorruptRecord(
                f"the adapter record has {len(body)} bytes after its header, but its header announces "
                f"{header.metadata_bytes + header.payload_bytes}"
            )
        zeroed = bytearray(blob[:HEADER_BYTES])
        zeroed[CHECKSUM] = _NO_CHECKSUM
        if _checksum(zeroed, body) != header.checksum:
            raise CorruptRecord("the adapter record does not match its checksum")
        metadata = _read_metadata(bytes(body[: header.metadata_bytes]))
        payload, trained = body[header.metadata_bytes :], None
        numbers = payload[: header.payload_bytes - header.head_bytes]
        if header.holds_trained_numbers:
            trained = _unpack_trained(numbers, header, cores)
            assert cores is not None
            R = cores.expand(trained.double()).float().contiguous()
        else:
            R = _unpack(numbers, header)
        try:
            head = _unpack_head(payload[header.payload_bytes - header.head_bytes :], header, metadata)
            return cls(header.basis_id, R, metadata, head, trained)
        except InvalidInput as error:  # the values: the shape comes from the header
            raise CorruptRecord(f"adapter record: {error.message}") from error

    @classmethod
    def of_version(
        cls, ref: AdapterRef, blob: bytes | None, cores: CoreParametrization | None = None
    ) -> Adapter:
        """Read the packed form that was fetched for `ref`. cores: as in `from_bytes`.

        Raises `NotFound` if there is none, `AdapterReplaced` if the store holds other weights under this
        version by now, `CorruptRecord`, `BasisMismatch`.
        """
        name = f"adapter version {ref.name}"
        if blob is None:
            raise NotFound(f"{name} is no longer stored", code="model_not_found", param="model")
        header = read_header(blob)
        if header.version != ref.version:
            raise CorruptRecord(f"the record stored as {name} is version {header.version}")
        if header.holds_trained_numbers and header.basis_id != ref.basis_id:
            raise BasisMismatch(f"the adapter belongs to basis {header.basis_id}, not to {ref.basis_id}")
        adapter = cls.from_bytes(blob, cores=cores)
        if ref.checksum not in ("", header.checksum.hex()):
            raise AdapterReplaced(
                f"{name} was replaced in the store while this request waited for it; send the request again"
            )
        if adapter.basis_id != ref.basis_id:
            raise BasisMismatch(f"the adapter belongs to basis {adapter.basis_id}, not to {ref.basis_id}")
        return adapter


@dataclass(frozen=True)
class Header:
    """The fixed part of a packed adapter."""

    version: int
    dtype: torch.dtype
    num_modules: int
    rank: int
    metadata_bytes: int
    payload_bytes: int
    basis_id: str
    checksum: bytes
    #: The scores and the width of the head; 0 without one.
    num_scores: int = 0
    head_width: int = 0
    #: Whether the payload holds the trained numbers instead of R.
    holds_trained_numbers: bool = False

    @property
    def head_bytes(self) -> int:
        return 4 * self.num_scores * (self.head_width + 1)


def read_header(blob: bytes) -> Header:
    """Parse the first 128 bytes and check their bounds, but not the checksum. Raises `CorruptRecord`."""
    if len(blob) < HEADER_BYTES:
        raise CorruptRecord(
            f"the adapter record has {len(blob)} bytes, fewer than its header of {HEADER_BYTES} bytes"
        )
    (magic, fmt, code, flags, version, modules, rank, metadata_bytes, payload_bytes, basis, checksum,
     num_scores, head_width) = _HEADER.unpack(blob[:HEADER_BYTES])  # fmt: skip
    if magic != MAGIC:
        raise CorruptRecord("these bytes are not an adapter record: they do not begin with TSRA")
    if fmt not in FORMATS or flags not in (0, TRAINED_NUMBERS):
        raise CorruptRecord(
            f"the adapter record has format {fmt} and flags {flags}; this build reads formats "
            f"{' and '.join(map(str, FORMATS))}"
        )
    if code not in _DTYPES or not 0 < rank <= MAX_RANK or not 0 < modules <= MAX_MODULES:
        raise CorruptRecord(f"adapter header out of range: dtype {code}, rank {rank}, modules {modules}")
    has_head = fmt == FORMAT_WITH_HEAD
    if has_head and not (0 < num_scores <= MAX_LABELS and 0 < head_width <= MAX_HEAD_WIDTH):
        raise CorruptRecord(f"adapter header out of range: head of {num_scores} scores, width {head_width}")
    header = Header(
        version, _DTYPES[code], modules, rank, metadata_bytes, payload_bytes, basis.hex(), checksum,
        num_scores=num_scores if has_head else 0, head_width=head_width if has_head else 0,
        holds_trained_numbers=flags == TRAINED_NUMBERS,
    )  # fmt: skip
    number_bytes = payload_bytes - header.head_bytes
    if header.holds_trained_numbers:
        fits = header.dtype != torch.int8 and number_bytes > 0 and number_bytes % header.dtype.itemsize == 0
    else:
        fits = number_bytes == payload_size(modules, rank, header.dtype)
    if metadata_bytes > MAX_METADATA_BYTES or not fits:
        raise CorruptRecord(
            f"adapter header out of range: metadata {metadata_bytes} B, payload {payload_bytes} B"
        )
    return header


def holds_trained_numbers(blob: bytes | None) -> bool:
    """Return whether a packed adapter can be read only with the cores of its basis; False for no adapter."""
    return blob is not None and blob[:4] == MAGIC and len(blob) >= HEADER_BYTES and blob[7] == TRAINED_NUMBERS


def payload_size(num_modules: int, rank: int, dtype: torch.dtype) -> int:
    """Return the bytes of R [M, r, r] in `dtype`, with int8 scales. 8B Llama, r = 16, float16: 114,688."""
    scales = 4 * num_modules if dtype == torch.int8 else 0
    return scales + num_modules * rank * rank * dtype.itemsize


def _read_metadata(text: bytes) -> dict[str, Any]:
    """Parse and check the metadata: a forged record can carry a correct checksum."""
    try:
        metadata = json.loads(text or b"{}")
        json.dumps(metadata, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"the metadata of the adapter record cannot be read: {error}") from error
    if not isinstance(metadata, dict):
        raise CorruptRecord("the metadata of the adapter record is not a JSON object")
    return metadata


def _checksum(header: bytes | bytearray, body: bytes | memoryview) -> bytes:
    digest = xxhash.xxh3_128(bytes(header))
    digest.update(body)
    return digest.digest()


def _pack(R: Tensor, dtype: torch.dtype) -> bytes:
    if dtype not in _DTYPE_CODES:
        raise InvalidInput(
            f"an adapter can be stored as {', '.join(DTYPE_NAMES)}, not as {dtype}", param="dtype"
        )
    R = R.detach().contiguous()
    if dtype == torch.int8:
        scales = R.abs().amax(dim=(1, 2)).clamp_min(torch.finfo(torch.float32).tiny) / 127
        values = torch.round(R / scales[:, None, None]).to(torch.int8)
        return _raw(scales) + _raw(values)
    values = R.to(dtype)
    if not bool(torch.isfinite(values).all()):
        raise InvalidInput(
            f"R does not fit {dtype}: its largest magnitude is {float(R.abs().max()):g}", param="dtype"
        )
    return _raw(values)


def _is_all_finite(R: Tensor) -> bool:
    """Return whether all values are finite.

    A finite sum proves it in a tenth of the time of testing each value (8B, rank 16: 9 µs against 109 µs). If
    the sum is not finite, it may only have overflowed, so each value is tested.
    """
    return math.isfinite(R.sum()) or bool(torch.isfinite(R).all())


def _unpack_trained(payload: memoryview, header: Header, cores: CoreParametrization | None) -> Tensor:
    """Read the trained numbers [*cores.shape] float32. The result owns its memory."""
    if cores is None:
        raise InvalidInput(
            f"the adapter is stored as trained numbers of basis {header.basis_id}; give that basis' cores",
            param="cores",
        )
    numbers = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(header.dtype).float()
    if numbers.numel() != math.prod(cores.shape):
        raise CorruptRecord(
            f"the adapter record holds {numbers.numel()} trained numbers, but its basis has {cores.shape}"
        )
    return numbers.view(cores.shape)


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _unpack(payload: memoryview, header: Header) -> Tensor:
    """Read R [M, r, r] float32 from the payload. The result owns its memory."""
    buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    shape = (header.num_modules, header.rank, header.rank)
    if header.dtype != torch.int8:
        return buffer.view(header.dtype).view(shape).float()
    scales = buffer[: 4 * header.num_modules].view(torch.float32)
    values = buffer[4 * header.num_modules :].view(torch.int8).view(shape)
    return values.float() * scales[:, None, None]


def _unpack_head(payload: memoryview, header: Header, metadata: dict[str, Any]) -> ClassificationHead | None:
    """Read the head [C, d + 1]; None if the record has none. Raises `InvalidInput`."""
    if header.num_scores == 0:
        return None
    weight = torch.frombuffer(bytearray(payload), dtype=torch.float32)
    return ClassificationHead(
        weight.view(header.num_scores, header.head_width + 1), described_labels(metadata)
    )
