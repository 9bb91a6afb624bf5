"""The reference to one adapter version, and the bounds of its packed form. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Dtypes in which R can be stored.
ADAPTER_DTYPES = ("float32", "float16", "bfloat16", "int8")
#: Place of the checksum in the packed form (`adapter.py`).
CHECKSUM = slice(64, 80)
#: Larger ranks are refused before anything is allocated, so that a forged header cannot make a reader reserve
#: memory. The limit is far above the ranks for which a square core makes sense.
MAX_RANK = 512

#: Intermediate states of a training job have this version number plus their step. Published versions have at
#: most nine digits, so no number means both.
_FIRST_CHECKPOINT = 1_000_000_000
#: In the name of an intermediate state, between the adapter's id and the step: OpenAI's word for it.
_STEP = ":ckpt-step-"
_NAME = re.compile(rf"([^@:]*)(?:@([1-9][0-9]{{0,8}})|{_STEP}([1-9][0-9]{{0,8}}))?")


def checkpoint_version(step: int) -> int:
    """Return the version number of a job's state after `step`."""
    return _FIRST_CHECKPOINT + step


def checkpoint_step(version: int) -> int | None:
    """Return the step of an intermediate state; None for the number of a published version."""
    return version - _FIRST_CHECKPOINT if version >= _FIRST_CHECKPOINT else None


def version_name(adapter_id: str, version: int) -> str:
    """Return `<id>@<version>`, or for an intermediate state `<id>:ckpt-step-<step>`."""
    step = checkpoint_step(version)
    return f"{adapter_id}@{version}" if step is None else f"{adapter_id}{_STEP}{step}"


def parse_version_name(name: str) -> tuple[str, int | None] | None:
    """Split a name into adapter id and version number (None: the active one); None if it has no such form.

    The id is not checked.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    adapter_id, version, step = found.groups()
    if step is not None:
        return adapter_id, checkpoint_version(int(step))
    return adapter_id, None if version is None else int(version)


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

    @property
    def name(self) -> str:
        """The name under which exactly this version can be asked for."""
        return version_name(self.adapter_id, self.version)
