"""Read server-sent events strictly."""

from __future__ import annotations

import json
from typing import Any

DONE = "[DONE]"


def parse(text: str) -> list[Any]:
    """The JSON of every event in order, and "[DONE]" as it is; comments are skipped."""
    assert text.endswith("\n\n")
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        assert block.startswith("data: "), block
        assert "\n" not in block
        data = block.removeprefix("data: ")
        events.append(data if data == DONE else json.loads(data))
    return events
