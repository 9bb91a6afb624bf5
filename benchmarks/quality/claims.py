"""The published orderings T1 to T15: for each, what the results say. Nothing is assumed about the outcome.

A finding is one comparison in one setting (data set and rank), at equal small rates or at the best of each
method's sweep. A claim holds in a mode if all its findings there do; else it is said how many do, and why
not: by how much, whether that is within the noise, whether a sweep ended too early to tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.quality.results import Loss, Mode, Results

MODES: tuple[Mode, ...] = ("small", "best")
MODE_NAMES = {"small": "equal small rate", "best": "best of sweep", "": "measured"}
#: "As good as": within this many nats, or within the noise of the seeds if that is more.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Finding:
    """One comparison. mode: "small", "best", or "" for what has no learning rate. text: with its numbers.

    margin: by how much the claim is right, in nats, negative if it is not; None where the comparison is not
    one of two losses. noise: what margin is within the noise. is_edge: one of the two was best at the end of
    its sweep, so a wider one might decide otherwise.
    """

    setting: str
    mode: str
    holds: bool
    text: str
    margin: float | None = None
    noise: float = 0.0
    is_edge: bool = False


#: From results to findings; none if nothing was measured.
Check = Callable[[Results], Iterator[Finding]]


@dataclass(frozen=True)
class Claim:
    """One published ordering. check: yields findings."""

    name: str
    text: str
    source: str
    check: Check

    def verdict(self, findings: Sequence[Finding]) -> str:
        """Per mode: holds, does not hold, or holds in so many of so many comparisons."""
        if not findings:
            return "not measured"
        parts = []
        for mode, members in by_mode(findings).items():
            outcomes = [finding.holds for finding in members]
            if all(outcomes):
                said = "holds"
            elif not any(outcomes):
                said = "does not hold"
            else:
                said = f"holds in {sum(outcomes)} of {len(outcomes)}"
            parts.append(f"{MODE_NAMES[mode]}: {said}")
        return "; ".join(parts)


def by_mode(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """In the order of their first appearance."""
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.mode, []).append(finding)
    return found


def reason(findings: Sequence[Finding]) -> str:
    """Why the verdict is what it is, per mode: the margins if all hold, else what speaks against it."""
    parts = [f"{MODE_NAMES[mode]}: {_reason(members)}" for mode, members in by_mode(findings).items()]
    return "; ".join(parts)


def _reason(findings: Sequence[Finding]) -> str:
    failed = [finding for finding in findings if not finding.holds]
    if not failed:
        margins = [finding.margin for finding in findings if finding.margin is not None]
        if not margins:
            return findings[0].text
        return f"by {min(margins):.3f} to {max(margins):.3f}" if len(margins) > 1 else f"by {margins[0]:.3f}"
    worst = min(failed, key=lambda finding: 0.0 if finding.margin is None else finding.margin)
    remarks = []
    tied = sum(f.margin is not None and -f.margin <= max(TOLERANCE, f.noise) for f in failed)
    if tied:
        remarks.append(f"{tied} of {len(failed)} against it are ties")
    edges = sum(finding.is_edge for finding in failed)
    if edges:
        remarks.append(f"{edges} compare with the end of a sweep")
    remark = f" ({', '.join(remarks)})" if remarks else ""
    return f"{worst.setting}, {worst.text}{remark}"


def better(
    results: Results,
    first: str,
    second: str,
    *,
    modes: Sequence[Mode] = MODES,
    ties: bool = False,
    settings: Sequence[tuple[str, int]] | None = None,
) -> Iterator[Finding]:
    """first has the lower loss, in every setting where both were measured. ties: or they are equal.

    settings: unset, those with all examples.
    """
    for data, rank in results.settings if settings is None else settings:
        for mode in modes:
            pair = [results.loss(data, case, rank, mode) for case in (first, second)]
            a, b = pair
            if a is None or b is None:
                continue
            holds = a.mean < b.mean or (ties and is_tie(a, b))
            sign = "≤" if ties else "<"
            text = f"{first} {sign} {second}: {compared(a, b)}"
            margin, is_edge = b.mean - a.mean, a.is_edge or b.is_edge
            yield Finding(setting(data, rank), mode, holds, text, margin, noise(a, b), is_edge)


def equal(results: Results, first: str, second: str, *, modes: Sequence[Mode] = MODES) -> Iterator[Finding]:
    """The two are within the tolerance or the noise."""
    for data, rank in results.settings:
        for mode in modes:
            a, b = (results.loss(data, case, rank, mode) for case in (first, second))
            if a is not None and b is not None:
                text = f"{first} ≈ {second}: {compared(a, b)}"
                holds, apart = is_tie(a, b), abs(a.mean - b.mean)
                is_edge = a.is_edge or b.is_edge
                yield Finding(
                    setting(data, rank), mode, holds, text, None if holds else -apart, noise(a, b), is_edge
                )


def chain(results: Results, *cases: str, modes: Sequence[Mode] = MODES) -> Iterator[Finding]:
    """Each is better than the next."""
    for first, second in itertools.pairwise(cases):
        yield from better(results, first, second, modes=modes)


def is_tie(a: Loss, b: Loss) -> bool:
    return abs(a.mean - b.mean) <= max(TOLERANCE, noise(a, b))


def noise(a: Loss, b: Loss) -> float:
    """The standard deviation of the difference of two runs."""
    return float(((a.std or 0.0) ** 2 + (b.std or 0.0) ** 2) ** 0.5)


def compared(a: Loss, b: Loss) -> str:
    remark = ", within noise" if abs(a.mean - b.mean) <= noise(a, b) else ""
    return f"{a}; {b}; difference {b.mean - a.mean:+.3f}{remark}"


def setting(data: str, rank: int) -> str:
    return f"{data}, r = {rank}"
