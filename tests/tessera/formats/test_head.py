"""Classification heads, alone and in the packed form of an adapter."""

from __future__ import annotations

import struct

import pytest
import torch
import xxhash

from tessera.errors import CorruptRecord, InvalidInput
from tessera.formats.adapter import DTYPE_NAMES, HEADER_BYTES, Adapter, read_header
from tessera.formats.head import CLASSIFICATION, REGRESSION, ClassificationHead

BASIS = "ab" * 32
LABELS = ("bad", "good", "ünclear")


def make_adapter(labels: tuple[str, ...] = LABELS, *, width: int = 5) -> Adapter:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(len(labels) or 1, width + 1, generator=generator)
    R = torch.randn(3, 2, 2, generator=generator)
    return Adapter(BASIS, R, {"job_id": "j"}, ClassificationHead(weight, labels))


def resealed(blob: bytes) -> bytes:
    """The record with the checksum of its present content."""
    zeroed = blob[:64] + bytes(16) + blob[80:HEADER_BYTES]
    digest = xxhash.xxh3_128(zeroed + blob[HEADER_BYTES:]).digest()
    return blob[:64] + digest + blob[80:]


def test_scores_are_the_affine_map_of_the_hidden_state() -> None:
    head = ClassificationHead(torch.tensor([[1.0, 2.0, 10.0], [0.0, -1.0, 0.5]]), ("a", "b"))
    assert head.scores(torch.tensor([[3.0, 4.0]])).tolist() == [[21.0, -3.5]]
    assert (head.width, head.is_regression) == (2, False)


@pytest.mark.parametrize("dtype", DTYPE_NAMES.values())
@pytest.mark.parametrize("labels", [LABELS, ()])
def test_a_head_survives_packing_exactly(dtype: torch.dtype, labels: tuple[str, ...]) -> None:
    adapter = make_adapter(labels)
    blob = adapter.to_bytes(version=4, dtype=dtype)
    header = read_header(blob)
    assert (blob[4], header.num_scores, header.head_width) == (2, len(labels) or 1, 5)
    assert header.head_bytes == 4 * (len(labels) or 1) * 6

    read = Adapter.from_bytes(blob, basis_id=BASIS)
    assert read.head is not None
    assert adapter.head is not None
    assert torch.equal(read.head.weight, adapter.head.weight), "the head is always float32"
    assert read.head.labels == labels
    kind = CLASSIFICATION if labels else REGRESSION
    assert read.metadata["classification"] == {"problem_type": kind, "labels": list(labels)}
    assert read.metadata["job_id"] == "j"


def test_an_adapter_without_a_head_keeps_the_format_that_all_releases_read() -> None:
    blob = Adapter(BASIS, torch.ones(3, 2, 2)).to_bytes(version=1)
    assert struct.unpack_from("<H", blob, 4) == (1,)
    assert blob[80:HEADER_BYTES] == bytes(48)
    assert Adapter.from_bytes(blob).head is None


def test_an_unknown_format_is_named() -> None:
    blob = bytearray(make_adapter().to_bytes(version=1))
    blob[4] = 3
    with pytest.raises(CorruptRecord, match=r"has format 3 .* reads formats 1 and 2"):
        read_header(bytes(blob))


@pytest.mark.parametrize(("offset", "value"), [(80, 0), (80, 1000), (84, 0), (84, 2**31)])
def test_a_header_out_of_range_is_refused(offset: int, value: int) -> None:
    blob = bytearray(make_adapter().to_bytes(version=1))
    struct.pack_into("<I", blob, offset, value)
    with pytest.raises(CorruptRecord, match="out of range"):
        Adapter.from_bytes(resealed(bytes(blob)))


@pytest.mark.parametrize("labels", [b'"bad","bad"', b'"bad",  null', b'"",  "good"'])
def test_metadata_that_do_not_fit_the_head_are_refused(labels: bytes) -> None:
    blob = make_adapter(("bad", "good")).to_bytes(version=1)
    forged = blob.replace(b'"bad","good"', labels.ljust(12)[:12])
    assert len(forged) == len(blob)
    with pytest.raises(CorruptRecord):
        Adapter.from_bytes(resealed(forged))


def test_a_head_that_is_no_head_is_refused() -> None:
    ones = torch.ones(2, 3)
    for weight, labels in (
        (ones, ("a",)), (ones, ("a", "a")), (ones, ("a", "b", "c")), (ones.double(), ("a", "b")),
        (torch.ones(2, 1), ("a", "b")), (ones * float("nan"), ("a", "b")), (ones, ()),
        (ones, ("a", "b" * 65)),
    ):  # fmt: skip
        with pytest.raises(InvalidInput):
            ClassificationHead(weight, labels)
