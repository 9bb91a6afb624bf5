"""How one adapter version is named, and the bounds of its packed form. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

#: How R may be stored.
ADAPTER_DTYPES = ("float32", "float16", "bfloat16", "int8")
#: Where the checksum stands in the packed form (`adapter.py`).
CHECKSUM = slice(64, 80)
#: Refused before any allocation: a forged header must not make a reader reserve memory. Far above the ranks
#: that a square core makes sense for.
MAX_RANK = 512


@dataclass(frozen=True)
class AdapterRef:
    """One immutable adapter version, resolved: what slots, caches and prefix keys are named by.

    A version number can come again with other weights: its tombstone has expired, an older state of the store
    was restored, or a replica took over that had not seen it. The checksum tells them apart.
    """

    tenant: str
    adapter_id: str
    version: int
    basis_id: str
    #: Of the packed form, as hex. "" stands for whatever the version holds, where no store says what that is.
    checksum: str = ""
