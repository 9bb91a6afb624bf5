"""Uploads of example files. A file is checked completely before it is stored."""

from __future__ import annotations

import re
from typing import BinaryIO

from service.jobs.upload_check import UploadCheck
from tessera.errors import InvalidInput
from tessera.store.files import FileRecord, FileStore

#: Files to train on, and files to build a basis from. In the latter, lines may name the user they belong to.
FINE_TUNE, CALIBRATION = PURPOSES = ("fine-tune", "calibration")
MAX_FILENAME = 255


async def keep_training_file(
    files: FileStore,
    check: UploadCheck,
    tenant: str,
    *,
    filename: str | None,
    purpose: str,
    content: BinaryIO,
    lifetime_s: int | None = None,
) -> FileRecord:
    """Check a JSONL file, including against the chat template of the base model, and store it.

    It is kept for `lifetime_s`, or until it is deleted. Raises `InvalidTrainingData` with every problem by
    line, and `InvalidInput` for an unknown purpose.
    """
    if purpose not in PURPOSES:
        known = " or ".join(map(repr, PURPOSES))
        raise InvalidInput(f"the purpose must be {known}; got {purpose[:64]!r}", param="purpose")
    found = await check.read(tenant, content, with_users=purpose == CALIBRATION)
    return await files.put(
        tenant,
        filename=plain_name(filename or ""),
        purpose=purpose,
        content=content,
        num_examples=found.num_examples,
        content_kind=found.kind,
        lifetime_s=lifetime_s,
    )


def plain_name(filename: str) -> str:
    """Return the last part of a path, made printable because a download returns it in a header."""
    name = re.split(r"[/\\]", filename)[-1]
    return re.sub(r"[^\w .()+-]", "_", name)[:MAX_FILENAME].strip() or "file.jsonl"
