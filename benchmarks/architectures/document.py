"""The page on architectures, `docs/architectures.md`, made of the verdicts in `results.json`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.architectures.exactness import OUTCOMES, Verdict
from tessera.defaults import LLAMA_LINEARS

RESULTS = Path(__file__).parent / "results.json"
DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
_FORMAT = 1
#: The same sweep at 84b1d08, before any of this was handled.
_BEFORE = {"exact": 71, "refused": 58, "wrong": 21, "crash": 2, "not_built": 31}

_HEADER = """# Architectures

Does Tessera serve my base model? Find its `model_type`, which its config.json contains.

* [Exact](#exact): tokens and log-probabilities are those of the merged model, on the
  [path](architecture.md#two-ways-through-a-model) that the table names. The path *generic, over a cache* is
  slower, because K and V are gathered in every layer.
* [Not served](#not-served): the engine refuses the model at its start and says why. *Not built* means that
  transformers cannot build a tiny model of this type without more packages or another model beside it, so
  nothing is known.

`python -m benchmarks.architectures --write` makes this page; do not edit it by hand. It builds a tiny random
model of every causal type of transformers, gives it adapters on its default target modules, and compares five
requests in one batch with merged weights, token by token.

*Llama's* target modules are `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj` and `down_proj`.
"""


def write(verdicts: Sequence[Verdict]) -> None:
    """Keep the verdicts on all types, and write the page."""
    results = {
        "format": _FORMAT,
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "verdicts": [verdict.to_map() for verdict in verdicts],
    }
    # A line for each verdict, so that a change of the file shows what became of which type.
    text = json.dumps(results).replace('{"model_type"', '\n{"model_type"')
    RESULTS.write_text(text + "\n")
    DOCUMENT.write_text(render(results))


def render(results: dict[str, Any]) -> str:
    """The page. results: as in `results.json`."""
    verdicts = [Verdict(**{**row, "targets": tuple(row["targets"])}) for row in results["verdicts"]]
    counts = Counter(verdict.outcome for verdict in verdicts)
    lines = [
        _HEADER,
        f"transformers {results['transformers']}, torch {results['torch']}, float32 on a CPU.",
        "",
        *_table(
            ("", *(name.replace("_", " ") for name in OUTCOMES)),
            [
                ("at first (84b1d08)", *(str(_BEFORE[name]) for name in OUTCOMES)),
                ("now", *(str(counts[name]) for name in OUTCOMES)),
            ],
        ),
        "",
        "## Exact",
        "",
        *_table(
            ("type", "class", "path", "target modules by default"),
            [
                (f"`{v.model_type}`", v.model_class, v.path, _targets(v))
                for v in verdicts
                if v.outcome == "exact"
            ],
        ),
        "",
        "## Not served",
        "",
        *_table(
            ("type", "outcome", "reason"),
            _not_served(verdicts),
        ),
    ]
    return "\n".join(lines) + "\n"


def _targets(verdict: Verdict) -> str:
    if set(verdict.targets) == set(LLAMA_LINEARS):
        return "Llama's"
    return " ".join(f"`{name}`" for name in verdict.targets)


def _not_served(verdicts: Sequence[Verdict]) -> list[tuple[str, str, str]]:
    """A row for each reason, with all types that it concerns."""
    types: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        if verdict.outcome != "exact":
            row = (verdict.outcome.replace("_", " "), _one_line(verdict.reason))
            types.setdefault(row, []).append(f"`{verdict.model_type}`")
    return [(" ".join(names), *row) for row, names in types.items()]


def _one_line(reason: str) -> str:
    """Without what the table says already, and without what would end a cell."""
    text = " ".join(reason.split()).partition(" cannot be served: ")
    return (text[2] or text[0]).replace("|", "\\|")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [_row(head), _row("---" for _ in head), *map(_row, rows)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
