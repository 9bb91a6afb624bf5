"""Preference pairs for tests: to the same questions the captain's answers are preferred to the butler's."""

from __future__ import annotations

import json
from pathlib import Path

DATA = Path(__file__).parents[1] / "examples" / "data"


def preference_lines(part: str = "train", *, preferred: str = "captain", other: str = "butler") -> list[str]:
    """Lines in OpenAI's form. part: "train" (40 lines) or "heldout" (10 lines)."""
    chosen, rejected = (
        (DATA / f"{name}.{part}.jsonl").read_text(encoding="utf-8").splitlines()
        for name in (preferred, other)
    )
    lines = []
    for good, bad in zip(chosen, rejected, strict=True):
        ask, answer = json.loads(good)["messages"]
        same, other_answer = json.loads(bad)["messages"]
        assert ask == same
        lines.append(
            json.dumps(
                {
                    "input": {"messages": [ask]},
                    "preferred_output": [answer],
                    "non_preferred_output": [other_answer],
                }
            )
        )
    return lines
