"""The parts of the benchmarks of the running service that can be wrong in silence: laws, figures, records."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from redis.asyncio import Redis

from benchmarks.load.adapters import TENANT, make_adapter, store_adapters
from benchmarks.load.arrivals import Zipf, gamma_arrivals
from benchmarks.load.client import Outcome
from benchmarks.load.figures import errors, hit_rates, latencies, slope_per_minute
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.store.adapters import AdapterStore


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(cv: float) -> None:
    times = gamma_arrivals(np.random.default_rng(1), rate=50.0, cv=cv, duration_s=400.0)
    gaps = np.diff([0.0, *times])

    assert len(times) == pytest.approx(20_000, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert times == gamma_arrivals(np.random.default_rng(1), rate=50.0, cv=cv, duration_s=400.0)


@pytest.mark.parametrize("s", [0.9, 1.2])
def test_popularity_is_zipfs_law_over_all_names(s: float) -> None:
    ranks = Zipf(1000, s).draw(np.random.default_rng(2), 200_000)
    counts = np.bincount(ranks, minlength=1000)
    law = np.arange(1, 1001) ** -s

    assert len(counts) == 1000
    assert counts[:20] / len(ranks) == pytest.approx(law[:20] / law.sum(), rel=0.1)
    assert counts[500:].sum() / len(ranks) == pytest.approx(law[500:].sum() / law.sum(), rel=0.1)


async def test_adapters_written_in_bulk_read_like_published_ones(redis: Redis, tiny_basis: Basis) -> None:
    await store_adapters(redis, tiny_basis.manifest, prefix="user", count=70)
    store = AdapterStore(redis)

    ref = await store.resolve(TENANT, "user-2")
    [blob] = await store.fetch([ref])
    record = await store.get(TENANT, "user-2")
    names = [item.adapter_id for item in (await store.list(TENANT, limit=100))[0]]

    assert blob is not None
    assert record.versions[0].bytes == len(blob)
    assert Adapter.from_bytes(blob, basis_id=tiny_basis.basis_id).num_modules == tiny_basis.num_modules
    assert sorted(names) == sorted(f"user-{index}" for index in range(70))
    assert await store.count() == 70
    published = await store.publish(
        TENANT, "user-2", make_adapter(tiny_basis.manifest, 5), dtype=torch.float16
    )
    assert published.version == 2
    assert await store.delete(TENANT, "user-3")


def test_figures_are_of_the_answers_that_ended_well() -> None:
    good = Outcome(10.0, token_times=[10.1, 10.2, 10.4], num_tokens=4)
    slow = Outcome(10.0, token_times=[10.3], num_tokens=1)
    bad = Outcome(10.0, token_times=[19.0], error="timeout")

    assert latencies([good, slow, bad], 50) == {"ttft_p50_ms": 200.0, "tpot_p50_ms": 100.0}
    assert latencies([bad], 50) == {"ttft_p50_ms": None, "tpot_p50_ms": None}
    assert errors([good, bad, bad]) == {"timeout": 2}
    assert slope_per_minute([0, 30, 60], [5.0, 6.0, 7.0]) == pytest.approx(2.0)


def test_hits_are_told_by_the_tier_in_which_they_were() -> None:
    loads = 'tessera_adapter_loads_total{tier="%s"}'
    before = {loads % "cached": 5.0, loads % "resident": 10.0}
    after = {loads % "cached": 15.0, loads % "resident": 50.0}

    assert hit_rates(before, after, 100) == {"hit_resident": 0.6, "hit_cached": 0.3, "hit_stored": 0.1}
