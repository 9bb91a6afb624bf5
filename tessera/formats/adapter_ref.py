"""The reference to one adapter version, and the bounds of its packed form. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

#: Dtypes in which R can be stored.
ADAPTER_DTYPES = ("float32", "float16", "bfloat16", "int8")
#: Place of the checksum in the packed form (`adapter.py`).
CHECKSUM = slice(64, 80)
#: Larger ranks are refused before anything is allocated, so that a forged header cannot make a reader reserve
#: memory. The limit is far above the ranks for which a square core makes sense.
MAX_RANK = 512


@dataclass(frozen=True)
class AdapterRef:
    """One immutable adapter version, resolved. Slots, caches and prefix keys use it as their key.

    A version number can occur again with other weights: after its tombstone has expired, after an older state
    of the store was restored, or after a failover to a replica that had not received it. The checksum
    distinguishes them.
    """

    tenant: str
    adapter_id: str
    version: int
    basis_id: str
    #: Checksum of the packed form, as hex. "" accepts any content, for adapters that come from no store.
    checksum: str = ""
