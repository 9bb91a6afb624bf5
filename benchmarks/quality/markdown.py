"""The report as Markdown: what was run, the orderings, a table for each data set and rank."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.automatic import rates_lines
from benchmarks.quality.claims import MODE_NAMES, Claim, Finding, reason
from benchmarks.quality.claims_core import CORE_CLAIMS
from benchmarks.quality.claims_lora import LORA_CLAIMS
from benchmarks.quality.claims_own import OWN_CLAIMS
from benchmarks.quality.results import Results, small_rate

CLAIMS: tuple[Claim, ...] = (*CORE_CLAIMS, *LORA_CLAIMS, *OWN_CLAIMS)
COLUMNS = (
    "method",
    "form",
    "best loss",
    "best rate",
    "of LoRA's gain",
    "trained numbers",
    "build s",
    "build peak MB",
    "loss at the small rate",
)
FORMS = {"lora": "A, B", "peft": "PEFT"}


def report(results: Results, *, hardware: dict[str, Any], settings: dict[str, Any]) -> str:
    """The whole report."""
    found = [(claim, list(claim.check(results))) for claim in CLAIMS]
    parts = [
        "# Quality of the methods",
        "",
        introduction(settings),
        "",
        "Measured on " + ", ".join(f"{key} {value}" for key, value in hardware.items()) + ".",
        "Settings: " + ", ".join(f"{key} {value}" for key, value in settings.items() if value) + ".",
        "",
        "## The published orderings",
        "",
        *orderings_table(found),
    ]
    parts += precision_lines(results)
    parts += rates_lines(results)
    names = results.all_datasets
    for data, rank in sorted(results.all_settings, key=lambda item: (names.index(item[0]), item[1])):
        parts += ["", f"## {data}, rank {rank}", "", *method_table(results, data, rank)]
    parts += ["", "## The orderings, comparison by comparison", ""]
    for claim, findings in found:
        parts += findings_list(claim, findings)
    return "\n".join(parts) + "\n"


def introduction(settings: dict[str, Any]) -> str:
    epochs, batch_size = settings["epochs"], settings["batch_size"]
    return (
        "Loss on held-out examples, in nats per token of the assistant, in float32 after the last step; the "
        "mean over seeds ± their standard deviation, at the rate that is best by that mean. The same "
        f"examples, batches and steps for all: {epochs} epoch(s) in batches of {batch_size}, AdamW without "
        "weight decay, a warm-up and a cosine. (edge): the best rate is the first or last of the sweep. Form "
        "r x r: both factors are frozen and R is trained; A, B: the factors themselves (B alone where A is "
        "frozen); PEFT: the peer's own code. Build times of runs with several workers are those of a shared "
        "device."
    )


def orderings_table(found: list[tuple[Claim, list[Finding]]]) -> list[str]:
    rows = ["| | claim | source | here | because |", "|---|---|---|---|---|"]
    for claim, findings in found:
        cells = (claim.name, claim.text, claim.source, claim.verdict(findings), reason(findings))
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def findings_list(claim: Claim, findings: list[Finding]) -> list[str]:
    lines = [f"**{claim.name}** {claim.text}: {claim.verdict(findings)}", ""]
    if not findings:
        return lines
    for finding in findings:
        sign = "yes" if finding.holds else "no"
        lines.append(f"* {sign} | {finding.setting} | {MODE_NAMES[finding.mode]} | {finding.text}")
    return [*lines, ""]


def precision_lines(results: Results) -> list[str]:
    """What training passes in TF32 change, if that was measured."""
    losses: dict[tuple[Any, ...], dict[bool, float]] = {}
    for row in results.probe("precision"):
        if row["loss"] is not None:
            key = tuple(row[name] for name in ("data", "case", "rank", "rate"))
            losses.setdefault(key, {})[row["is_fast"]] = row["loss"]
    apart = [abs(pair[True] - pair[False]) for pair in losses.values() if len(pair) == 2]
    if not apart:
        return []
    return [
        "",
        "Training passes in TF32 instead of float32 change the final loss by at most "
        f"{max(apart):.4f} ({len(apart)} runs with the same data and rate).",
    ]


def method_table(results: Results, data: str, rank: int) -> list[str]:
    """Methods by their best loss, the base model first."""
    rows = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    if data in results.base:
        rows.append(f"| base model | | {results.base[data]:.3f} | | 0 % | 0 | | | |")
    ordered = sorted(results.cases(data, rank), key=lambda case: best_loss(results, data, case, rank))
    return rows + [method_row(results, data, case, rank) for case in ordered]


def method_row(results: Results, data: str, case: str, rank: int) -> str:
    best, small = results.loss(data, case, rank), results.loss(data, case, rank, "small")
    assert best is not None
    form, _, name = case.rpartition(":")
    share, build = results.share(data, case, rank), results.build(data, case, rank)
    spread = "" if best.std is None else f" ± {best.std:.3f}"
    peak = "" if build is None or build["peak_bytes"] is None else f"{build['peak_bytes'] / 1e6:.0f}"
    cells = (
        name,
        FORMS.get(form, "r x r"),
        f"{best.mean:.3f}{spread}",
        f"{best.rate:g}{' (edge)' if best.is_edge else ''}",
        "" if share is None else f"{share:.0%}",
        f"{results.parameters(data, case, rank):,}",
        "" if build is None else f"{build['seconds']:.1f}",
        peak,
        "" if small is None else f"{small.mean:.3f} ({small_rate(case):g})",
    )
    return "| " + " | ".join(cells) + " |"


def best_loss(results: Results, data: str, case: str, rank: int) -> float:
    loss = results.loss(data, case, rank)
    assert loss is not None
    return loss.mean
