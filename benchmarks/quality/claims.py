"""The published orderings T1 to T15: for each, what the results say. Nothing is assumed about the outcome.

A finding is one comparison in one setting (data set and rank), at equal small rates or at the best of each
method's sweep. A claim holds in a mode if all its findings there do; else it is said how many do.
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
    """One comparison. mode: "small", "best", or "" for what has no learning rate. text: with its numbers."""

    setting: str
    mode: str
    holds: bool
    text: str


#: From results to findings; none if nothing was measured.
Check = Callable[[Results], Iterator[Finding]]


@dataclass(frozen=True)
class Claim:
    """T1 to T15. check: yields findings."""

    name: str
    text: str
    source: str
    check: Check

    def verdict(self, findings: Sequence[Finding]) -> str:
        """Per mode: holds, does not hold, or holds in so many of so many comparisons."""
        if not findings:
            return "not measured"
        parts = []
        for mode in dict.fromkeys(finding.mode for finding in findings):
            outcomes = [finding.holds for finding in findings if finding.mode == mode]
            if all(outcomes):
                said = "holds"
            elif not any(outcomes):
                said = "does not hold"
            else:
                said = f"holds in {sum(outcomes)} of {len(outcomes)}"
            parts.append(f"{MODE_NAMES[mode]}: {said}")
        return "; ".join(parts)


def better(
    results: Results, first: str, second: str, *, modes: Sequence[Mode] = MODES, ties: bool = False
) -> Iterator[Finding]:
    """first has the lower loss, in every setting where both were measured. ties: or they are equal."""
    for data, rank in results.settings:
        for mode in modes:
            pair = [results.loss(data, case, rank, mode) for case in (first, second)]
            a, b = pair
            if a is None or b is None:
                continue
            holds = a.mean < b.mean or (ties and is_tie(a, b))
            sign = "≤" if ties else "<"
            yield Finding(setting(data, rank), mode, holds, f"{first} {sign} {second}: {compared(a, b)}")


def equal(results: Results, first: str, second: str, *, modes: Sequence[Mode] = MODES) -> Iterator[Finding]:
    """The two are within the tolerance or the noise."""
    for data, rank in results.settings:
        for mode in modes:
            a, b = (results.loss(data, case, rank, mode) for case in (first, second))
            if a is not None and b is not None:
                text = f"{first} ≈ {second}: {compared(a, b)}"
                yield Finding(setting(data, rank), mode, is_tie(a, b), text)


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
