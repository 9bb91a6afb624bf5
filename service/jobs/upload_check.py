"""Check a file of examples in a thread, and a large one in a process of its own."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, BinaryIO

from service.processes.fair_gate import FairGate
from service.processes.twin import DEFAULT_LIMITS, Twin, Work, size_of
from tessera.chat.chat_format import ChatFormat
from tessera.data.examples import MAX_EXAMPLES, ExampleFile, for_each
from tessera.data.labels import is_labelled, parse_labelled
from tessera.data.pairs import Pair, holds_pairs, parse_pairs
from tessera.errors import InvalidInput, InvalidTrainingData, LineError

#: Files up to this size are checked in a thread, which takes 10 ms.
MAX_INLINE_BYTES = 16 * 1024
#: The twin's names of this work.
_PLAIN, _WITH_USERS = b"-", b"u"


#: What the lines of a file are (`FileRecord.content_kind`).
EXAMPLES, PAIRS, LABELLED = "examples", "pairs", "labelled"


@dataclass(frozen=True)
class FileContent:
    """What a file without errors holds."""

    #: EXAMPLES, PAIRS or LABELLED.
    kind: str
    num_examples: int


class UploadCheck:
    """Counts the examples of files and finds their errors: two files at a time, and one per tenant.

    twin: checks large files, with `upload_works`; None: all files are checked in threads of this process.
    """

    def __init__(
        self, chat: ChatFormat, twin: Twin | None = None, *, max_examples: int = MAX_EXAMPLES
    ) -> None:
        self._chat = chat
        self._max_examples = max_examples
        self._twin = twin
        self._gate = FairGate(capacity=2, share=1)

    async def read(self, tenant: str, content: bytes | BinaryIO, *, with_users: bool) -> FileContent:
        """Return what a JSONL file holds. Raises `InvalidTrainingData`, `InvalidInput`."""
        async with self._gate.room(tenant):
            found = await self._check(content, with_users)
        if "errors" in found:
            errors = [LineError(*error) for error in found["errors"]]
            raise InvalidTrainingData(errors, code=found["code"], num_problems=found["num_problems"])
        return FileContent(found["kind"], int(found["num_examples"]))

    async def _check(self, content: bytes | BinaryIO, with_users: bool) -> dict[str, Any]:
        if self._twin is None or size_of(content) <= MAX_INLINE_BYTES:
            whole = content if isinstance(content, bytes) else content.read()
            return await asyncio.to_thread(
                check, whole, self._chat, with_users=with_users, max_examples=self._max_examples
            )
        reply = await self._twin.work(_WITH_USERS if with_users else _PLAIN, content)
        if not reply:
            raise InvalidInput(
                f"the file could not be checked within {DEFAULT_LIMITS}; split it, or simplify its lines",
                param="file",
                code="file_too_complex",
            )
        found: dict[str, Any] = json.loads(bytes(reply))
        return found


def check(
    content: bytes, chat: ChatFormat, *, with_users: bool, max_examples: int = MAX_EXAMPLES
) -> dict[str, Any]:
    """Return the kind and number of examples in a file, or its errors, as JSON values.

    The first line says whether the file holds pairs or labelled texts, unless its lines may name users.
    """

    def check_pair(pair: Pair) -> None:
        chat.check(pair.chosen)
        chat.check(pair.rejected)

    try:
        if not with_users and is_labelled(content):
            return {"kind": LABELLED, "num_examples": len(parse_labelled(content, max_examples=max_examples))}
        if not with_users and holds_pairs(content):
            pairs = parse_pairs(content, max_pairs=max_examples)
            for_each(pairs, check_pair)
            return {"kind": PAIRS, "num_examples": len(pairs)}
        examples = ExampleFile(content, with_users=with_users, max_examples=max_examples)
        for_each(examples, chat.check)
    except InvalidTrainingData as error:
        errors = [(problem.line, problem.code, problem.message) for problem in error.errors]
        return {"errors": errors, "code": error.code, "num_problems": error.num_problems}
    return {"kind": EXAMPLES, "num_examples": len(examples)}


def upload_works(chat: ChatFormat, *, max_examples: int = MAX_EXAMPLES) -> dict[bytes, Work]:
    """Return the work of checking a file, by name, for `fork_twin`."""

    def work(content: bytes, *, with_users: bool) -> bytes:
        found = check(content, chat, with_users=with_users, max_examples=max_examples)
        return json.dumps(found).encode()

    return {
        _PLAIN: lambda content: work(content, with_users=False),
        _WITH_USERS: lambda content: work(content, with_users=True),
    }
