"""The engine forgets an adapter when it is no longer in use: only the store knows millions of them by
name."""

from __future__ import annotations

import gc
from collections.abc import Callable

from redis.asyncio import Redis

from service.engine.step_loop import MAX_PAST_DEADLINES
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.redis import keys
from tessera.store.adapters import MAX_KNOWN_SIZES, AdapterStore
from tests.service.engine.driver import Driver
from tests.service.engine.models import family

NUM_REQUESTS, NUM_TENANTS = 600, 40
NUM_SLOTS, NUM_CACHED = 3, 5
PARAMS = SamplingParams(max_tokens=1, temperature=0.0)


def num_alive(prefix: str) -> int:
    """Number of AdapterRefs with such names that are still referenced."""
    gc.collect()
    return sum(type(o) is AdapterRef and o.adapter_id.startswith(prefix) for o in gc.get_objects())


def test_what_the_engine_remembers_of_adapters_is_what_it_holds(start: Callable[..., Driver]) -> None:
    served = family("micro")
    R, basis_id = served.adapters[served.refs[0]].R, served.basis.basis_id
    engine = start(served, num_slots=NUM_SLOTS, host_cache_bytes=NUM_CACHED * R.nbytes).engine

    for number in range(NUM_REQUESTS):
        tenant = f"t{number % NUM_TENANTS}"
        ref = AdapterRef(tenant, f"bounded-{number}", 1, basis_id)
        engine.submit(GenerationRequest(f"r{number}", tenant, [1, 2], PARAMS, ref, timeout_s=600.0))
        for missing in engine.missing_adapters():
            engine.provide_adapter(missing, Adapter(basis_id, R.clone()))
        while engine.has_work:
            engine.step()
        if number % 7 == 0:
            engine.unload(tenant, ref.adapter_id)
    del ref, missing

    assert num_alive("bounded-") <= NUM_SLOTS + NUM_CACHED
    assert len(engine._in_flight._deadlines) <= MAX_PAST_DEADLINES + 2
    engine.check_integrity()


async def test_the_store_remembers_the_sizes_of_so_many_bases_only(redis: Redis) -> None:
    store = AdapterStore(redis)
    refs = [AdapterRef("t", f"a{n}", 1, f"basis-{n}") for n in range(MAX_KNOWN_SIZES + 50)]
    await redis.mset({keys.adapter_blob(ref.tenant, ref.adapter_id, 1): b"blob" for ref in refs})

    assert await store.fetch(refs) == [b"blob"] * len(refs)
    assert await store.fetch(refs[-50:]) == [b"blob"] * 50
    assert len(store._blob_bytes) == MAX_KNOWN_SIZES
