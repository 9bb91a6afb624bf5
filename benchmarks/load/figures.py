"""From outcomes to figures: latencies by percentile, errors, hits by tier, slopes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.load.client import Outcome

_LOADS = 'tessera_adapter_loads_total{tier="%s"}'


def latencies(outcomes: Sequence[Outcome], *percentiles: int) -> dict[str, Any]:
    """Time to first token and time per token of those that ended well, in milliseconds."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    first = [outcome.first_token_s for outcome in good]
    each = [outcome.per_token_s for outcome in good]
    return {**milliseconds("ttft", first, *percentiles), **milliseconds("tpot", each, *percentiles)}


def milliseconds(name: str, times_s: Iterable[float | None], *percentiles: int) -> dict[str, Any]:
    known = [time_s for time_s in times_s if time_s is not None]
    if not known:
        return {f"{name}_p{p}_ms": None for p in percentiles}
    return {f"{name}_p{p}_ms": round(float(np.percentile(known, p)) * 1e3, 2) for p in percentiles}


def errors(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None))


def hit_rates(before: Mapping[str, float], after: Mapping[str, float], num_requests: int) -> dict[str, float]:
    """Of requests for adapters: the share that found theirs in a slot, in host memory, or in the store only.

    before, after: `ServiceStack.metrics` around them.
    """
    stored, resident = (
        after.get(_LOADS % tier, 0.0) - before.get(_LOADS % tier, 0.0) for tier in ("cached", "resident")
    )
    total = max(1, num_requests)
    return {
        "hit_resident": round(max(0.0, 1 - resident / total), 4),
        "hit_cached": round(max(0.0, (resident - stored) / total), 4),
        "hit_stored": round(stored / total, 4),
    }


def slope_per_minute(times_s: Sequence[float], values: Sequence[float]) -> float:
    """By least squares; 0 for fewer than 3 points."""
    if len(times_s) < 3:
        return 0.0
    return float(np.polyfit(np.asarray(times_s) / 60, np.asarray(values, dtype=np.float64), 1)[0])
