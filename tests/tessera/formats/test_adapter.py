"""The packed adapter: it round-trips, and anything else is refused."""

from __future__ import annotations

import json
import struct

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tessera.errors import BasisMismatch, CorruptRecord, InvalidInput
from tessera.formats.adapter import (
    DTYPE_NAMES,
    HEADER_BYTES,
    MAX_METADATA_BYTES,
    Adapter,
    delta,
    payload_size,
    read_header,
)

BASIS = "ab" * 32
METADATA = {"job": "ftjob-1", "loss": 0.25, "note": "naïve – 好"}


def make_adapter(num_modules: int = 3, rank: int = 2, *, seed: int = 0, scale: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    R = scale * torch.randn(num_modules, rank, rank, generator=generator)
    return Adapter(BASIS, R, METADATA)


def resealed(blob: bytes) -> bytes:
    """Return the same bytes with a correct checksum, as a forger would send them."""
    zeroed = blob[:64] + bytes(16) + blob[80:HEADER_BYTES]
    digest = xxhash.xxh3_128(zeroed + blob[HEADER_BYTES:]).digest()
    return blob[:64] + digest + blob[80:]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_floating_dtypes_come_back_as_they_were_rounded(dtype: str) -> None:
    adapter = make_adapter(5, 7)
    read = Adapter.from_bytes(adapter.to_bytes(version=9, dtype=DTYPE_NAMES[dtype]), basis_id=BASIS)
    assert torch.equal(read.R, adapter.R.to(DTYPE_NAMES[dtype]).float())
    assert (read.basis_id, read.metadata, read.rank, read.num_modules) == (BASIS, METADATA, 7, 5)
    assert read.R.is_contiguous()


def test_int8_is_within_half_a_step_per_module() -> None:
    R = make_adapter(4, 6).R * torch.tensor([1e-6, 1.0, 300.0, 0.0])[:, None, None]
    read = Adapter.from_bytes(Adapter(BASIS, R).to_bytes(version=1, dtype=torch.int8))
    step = R.abs().amax(dim=(1, 2)) / 127
    assert ((read.R - R).abs() <= 0.5001 * step[:, None, None]).all()
    assert torch.equal(read.R[3], torch.zeros(6, 6))


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_header_stands_at_fixed_offsets(dtype: str) -> None:
    blob = make_adapter(3, 2).to_bytes(version=0x01020304, dtype=DTYPE_NAMES[dtype])
    assert blob[:4] == b"TSRA"
    assert struct.unpack_from("<I", blob, 8) == (0x01020304,)
    assert blob[32:64].hex() == BASIS
    header = read_header(blob)
    assert (header.version, header.rank, header.num_modules) == (0x01020304, 2, 3)
    assert header.dtype == DTYPE_NAMES[dtype]
    assert len(blob) == HEADER_BYTES + header.metadata_bytes + payload_size(3, 2, header.dtype)
    assert json.loads(blob[HEADER_BYTES : HEADER_BYTES + header.metadata_bytes]) == METADATA


def test_an_adapter_of_an_8b_model_is_112_kib() -> None:
    assert payload_size(224, 16, torch.float16) == 114_688
    assert payload_size(224, 16, torch.int8) == 224 * (256 + 4)


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(sorted(DTYPE_NAMES)),
    st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.integers() | st.booleans(), max_size=4),
    st.data(),
)
def test_any_finite_adapter_survives_the_trip(
    num_modules: int, rank: int, dtype: str, metadata: dict[str, object], data: st.DataObject
) -> None:
    count = num_modules * rank * rank
    values = st.floats(-6e4, 6e4, width=32)
    R = torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count))).view(-1, rank, rank)
    blob = Adapter(BASIS, R, metadata).to_bytes(version=1, dtype=DTYPE_NAMES[dtype])
    read = Adapter.from_bytes(blob)
    assert read.metadata == metadata
    if dtype == "float32":
        assert torch.equal(read.R, R)
    assert Adapter.from_bytes(read.to_bytes(version=1, dtype=torch.float32)).R.equal(read.R)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_every_truncation_is_refused(dtype: str) -> None:
    blob = make_adapter().to_bytes(version=1, dtype=DTYPE_NAMES[dtype])
    for length in range(len(blob)):
        with pytest.raises(CorruptRecord):
            Adapter.from_bytes(blob[:length])
    with pytest.raises(CorruptRecord):
        Adapter.from_bytes(blob + b"\0")


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_every_bit_flip_is_refused(dtype: str) -> None:
    blob = bytearray(make_adapter().to_bytes(version=1, dtype=DTYPE_NAMES[dtype]))
    for position in range(len(blob)):
        for bit in range(8):
            blob[position] ^= 1 << bit
            with pytest.raises(CorruptRecord):
                Adapter.from_bytes(bytes(blob))
            blob[position] ^= 1 << bit


@given(st.data())
def test_overwritten_stretches_are_refused(data: st.DataObject) -> None:
    blob = make_adapter(4, 4).to_bytes(version=1)
    start = data.draw(st.integers(0, len(blob) - 1))
    stretch = data.draw(st.binary(min_size=1, max_size=len(blob) - start))
    changed = blob[:start] + stretch + blob[start + len(stretch) :]
    if changed != blob:
        with pytest.raises(CorruptRecord):
            Adapter.from_bytes(changed)


@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    for blob in (noise, b"TSRA" + noise, b"TSRA\x01\0\x01\0" + noise):
        with pytest.raises(CorruptRecord):
            Adapter.from_bytes(blob)


@pytest.mark.parametrize("offset", [12, 16, 20, 24], ids=["modules", "rank", "metadata", "payload"])
@pytest.mark.parametrize("value", [0, 1 << 31, 0xFFFF_FFFF])
def test_forged_sizes_are_refused_before_anything_is_allocated(offset: int, value: int) -> None:
    blob = bytearray(make_adapter().to_bytes(version=1))
    struct.pack_into("<I", blob, offset, value)
    with pytest.raises(CorruptRecord):
        Adapter.from_bytes(resealed(bytes(blob)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    R = torch.zeros(4, 2, 2)
    R[2, 1, 0] = bad
    with pytest.raises(InvalidInput, match="module 2") as refused:
        Adapter(BASIS, R)
    assert refused.value.param == "R"


def test_large_values_whose_sum_overflows_are_kept() -> None:
    R = torch.full((1, 2, 2), 3e38)
    blob = Adapter(BASIS, R).to_bytes(version=1, dtype=torch.float32)

    assert torch.equal(Adapter.from_bytes(blob).R, R)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_values_that_are_not_finite_are_refused_in_stored_bytes(dtype: str) -> None:
    blob = bytearray(Adapter(BASIS, torch.ones(2, 2, 2)).to_bytes(version=1, dtype=DTYPE_NAMES[dtype]))
    start = len(blob) - payload_size(2, 2, DTYPE_NAMES[dtype])
    nan = {"float16": b"\x00\x7e", "bfloat16": b"\xc0\x7f"}.get(dtype, struct.pack("<f", float("nan")))
    blob[start : start + len(nan)] = nan  # for int8 this is the scale of the first module
    with pytest.raises(CorruptRecord, match="not finite"):
        Adapter.from_bytes(resealed(bytes(blob)))


@pytest.mark.parametrize(
    "R",
    [
        torch.zeros(2, 2),
        torch.zeros(2, 2, 3),
        torch.zeros(0, 2, 2),
        torch.zeros(2, 0, 0),
        torch.zeros(2, 2, 2).double(),
        torch.zeros(2, 2, 2, dtype=torch.int64),
    ],
    ids=lambda R: f"{list(R.shape)}-{R.dtype}",
)
def test_other_shapes_and_dtypes_are_refused(R: Tensor) -> None:
    with pytest.raises(InvalidInput, match="R must be"):
        Adapter(BASIS, R)


def test_overflow_of_the_stored_dtype_is_refused() -> None:
    adapter = make_adapter(scale=1e6)
    with pytest.raises(InvalidInput, match=r"does not fit torch\.float16") as refused:
        adapter.to_bytes(version=1, dtype=torch.float16)
    assert refused.value.param == "dtype"
    assert Adapter.from_bytes(adapter.to_bytes(version=1, dtype=torch.bfloat16)).rank == 2


def test_unknown_dtype_and_oversized_metadata_are_refused() -> None:
    with pytest.raises(InvalidInput, match="float64"):
        make_adapter().to_bytes(version=1, dtype=torch.float64)
    with pytest.raises(InvalidInput, match="metadata"):
        Adapter(BASIS, torch.zeros(1, 1, 1), {"x": "y" * MAX_METADATA_BYTES}).to_bytes(version=1)


@pytest.mark.parametrize("metadata", [b"{broken", b"[1]", b"1", b'{"a":NaN}', b"\xff", b"[" * 30_000])
def test_forged_metadata_is_refused(metadata: bytes) -> None:
    blob = Adapter(BASIS, torch.zeros(1, 1, 1)).to_bytes(version=1)
    payload = blob[HEADER_BYTES + 2 :]  # after "{}"
    forged = bytearray(blob[:HEADER_BYTES])
    struct.pack_into("<I", forged, 20, len(metadata))
    with pytest.raises(CorruptRecord):
        Adapter.from_bytes(resealed(bytes(forged) + metadata + payload))


def test_an_adapter_of_another_basis_is_refused() -> None:
    blob = make_adapter().to_bytes(version=1)
    with pytest.raises(BasisMismatch, match=BASIS):
        Adapter.from_bytes(blob, basis_id="cd" * 32)


def test_a_newer_format_says_so() -> None:
    blob = bytearray(make_adapter().to_bytes(version=1))
    struct.pack_into("<H", blob, 4, 3)
    with pytest.raises(CorruptRecord, match="format 3"):
        Adapter.from_bytes(resealed(bytes(blob)))


def test_delta_is_what_the_merged_weight_would_add() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 11), (3, 11), (3, 3), (7, 3)]
    x, A, R, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    torch.testing.assert_close(delta(x, A, R, B), x @ (B @ R @ A).T)
