"""Does anything leak or get stuck? Minutes of mixed traffic with cancellations, errors and adapter churn.

    python -m benchmarks.serving.soak [--minutes 10] [--clients 8] [--workers 2] [--json FILE]

Clients send requests without a pause, short and long ones, for adapters and the base model. Some hang up in
the middle, and some cannot be served. Meanwhile adapters are published, published again (as training does),
deleted and damaged. Every few seconds the engine checks its books (blocks, slots, references) between two
steps, and memory is read. In the end everything must be idle: nothing held, nothing waiting, every request
ended. Otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load.churn import Churn
from benchmarks.load.client import Outcome, Prompt, complete
from benchmarks.load.figures import latencies, slope_per_minute
from benchmarks.load.options import add_stack_options, stack_environment
from benchmarks.load.stack import ServiceStack, running_stack
from benchmarks.report import print_table, save
from benchmarks.serving.server import default_basis_id
from service.engine.client.attachment import AttachedEngine
from service.engine.wire.messages import EngineStats
from tessera.errors import EngineUnavailable, RequestFailed
from tessera.redis.client import connect
from tessera.store.bases import BasisStore

TIMEOUT_S = 120.0
DRAIN_TIMEOUT_S = 60.0
#: What a client may be told without anything being wrong: it asked for it, or an adapter was gone or damaged.
EXPECTED_ERRORS = {"model_not_found", "corrupt_record", "context_length_exceeded", "invalid_value"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=64, help="names that are alive at once")
    add_stack_options(parser, slots=16, workers=2)
    parser.add_argument("--host-cache-bytes", type=int, default=2**20, help="small, so that it evicts")
    parser.add_argument("--num-blocks", type=int, default=48, help="few, so that sequences are preempted")
    parser.add_argument("--check-every-s", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = {
        **stack_environment(arguments),
        "TESSERA_ENGINE_HOST_CACHE_BYTES": str(arguments.host_cache_bytes),
        "TESSERA_ENGINE_NUM_BLOCKS": str(arguments.num_blocks),
    }
    with running_stack(chosen) as stack:
        soak = Soak(stack, arguments)
        asyncio.run(soak.run())
        row = soak.result()
    print_table([{"figure": name, "value": value} for name, value in row.items()])
    save(arguments.json, question=__doc__.splitlines()[0], arguments=vars(arguments),
         rows=[row, *soak.samples])  # fmt: skip
    return 0 if row["passed"] else 1


class Soak:
    """Traffic against one stack, and what was seen of it. samples: memory and occupancy over time."""

    def __init__(self, stack: ServiceStack, arguments: argparse.Namespace) -> None:
        self._stack = stack
        self._arguments = arguments
        self._outcomes: list[Outcome] = []
        self._base_name = stack.base_name()
        self._is_over = False
        self._started_at = time.monotonic()
        self._engine: AttachedEngine
        self._churn: Churn
        self._num_checks = 0
        self._violations: list[str] = []
        self._restarts = 0
        self._idle: EngineStats | None = None
        self.samples: list[dict[str, Any]] = []

    async def run(self) -> None:
        self._engine = AttachedEngine(self._stack.engine_socket, heartbeat_timeout_s=60.0)
        await self._engine.start()
        await self._engine.wait_ready(60.0)
        async with connect(self._stack.store_url) as redis:
            manifest = await BasisStore(redis).manifest(await default_basis_id(self._stack))
            self._churn = Churn(redis, manifest, num_alive=self._arguments.adapters)
            await self._churn.begin()
            self._started_at = time.monotonic()
            clients = [self._client(number) for number in range(self._arguments.clients)]
            await asyncio.gather(self._stop_in_time(), self._watch(), self._keep_churning(), *clients)
        await self._drain()
        self._restarts = self._engine.restarts_total
        await self._engine.close()

    async def _stop_in_time(self) -> None:
        await asyncio.sleep(60 * self._arguments.minutes)
        self._is_over = True

    async def _client(self, number: int) -> None:
        rng = np.random.default_rng(number)
        while not self._is_over:
            self._outcomes.append(await complete(self._stack.port, self._draw(rng), timeout_s=TIMEOUT_S))

    def _draw(self, rng: np.random.Generator) -> Prompt:
        kind = rng.random()
        length, max_tokens = int(rng.integers(1, 200)), int(rng.integers(1, 48))
        token_ids = [int(token) for token in rng.integers(5, 1000, length)]
        if kind < 0.03:
            return Prompt("no-such-adapter", token_ids, max_tokens)
        if kind < 0.05:
            return Prompt(self._base_name, token_ids, 10**6)
        if kind < 0.07:
            return Prompt(self._base_name, [*token_ids, 10**8], max_tokens)
        model = self._base_name if kind < 0.2 else self._churn.pick(rng)
        cancel_after = int(rng.integers(1, 8)) if rng.random() < 0.15 else None
        return Prompt(model, token_ids, max_tokens, cancel_after)

    async def _keep_churning(self) -> None:
        rng = np.random.default_rng(10**6)
        while not self._is_over:
            await self._churn.change(rng, self._stack.port)
            await asyncio.sleep(0.25)

    async def _watch(self) -> None:
        while not self._is_over:
            await asyncio.sleep(self._arguments.check_every_s)
            await self._check()
            stats = self._engine.stats
            self.samples.append(
                {
                    "at_s": round(time.monotonic() - self._started_at, 1),
                    "requests": len(self._outcomes),
                    **{f"{name}_mb": round(n / 1e6, 2) for name, n in self._stack.resident_bytes().items()},
                    **({} if stats is None else {**_device_memory(stats), **_occupancy(stats)}),
                }
            )

    async def _check(self) -> None:
        self._num_checks += 1
        try:
            await self._engine.check_integrity()
        except (RequestFailed, EngineUnavailable) as error:
            self._violations.append(str(error))

    async def _drain(self) -> None:
        """Wait until the engine has nothing left to do, and check once more."""
        give_up_at = time.monotonic() + DRAIN_TIMEOUT_S
        while time.monotonic() < give_up_at:
            stats = self._engine.stats
            if stats is not None and _is_idle(stats):
                break
            await asyncio.sleep(0.5)
        self._idle = self._engine.stats
        await self._check()

    def result(self) -> dict[str, Any]:
        """All figures, and whether what must hold does."""
        told = Counter(outcome.error for outcome in self._outcomes if outcome.error is not None)
        unexpected = {code: count for code, count in told.items() if code not in EXPECTED_ERRORS}
        is_idle = self._idle is not None and _is_idle(self._idle)
        passed = is_idle and not unexpected and not self._violations and self._restarts == 0
        return {
            "passed": passed,
            "minutes": self._arguments.minutes,
            "requests": len(self._outcomes),
            "finished": sum(o.error is None and not o.is_cancelled for o in self._outcomes),
            "cancelled": sum(outcome.is_cancelled for outcome in self._outcomes),
            "errors": dict(told),
            "unexpected": unexpected,
            "churn": dict(self._churn.counts),
            "integrity_checks": self._num_checks,
            "violations": self._violations[:5],
            "engine_restarts": self._restarts,
            "idle_at_the_end": is_idle,
            **self._slopes(),
            **latencies([o for o in self._outcomes if not o.is_cancelled], 50, 99),
            "engine": {} if self._idle is None else dataclasses.asdict(self._idle),
        }

    def _slopes(self) -> dict[str, float]:
        """Growth of memory over the second half, in MB a minute: caches fill in the first."""
        half = self.samples[len(self.samples) // 2 :]
        times = [sample["at_s"] for sample in half]
        names = [name for name in (half[0] if half else {}) if name.endswith("_mb")]
        return {
            f"{name}_per_min": round(slope_per_minute(times, [s.get(name, 0.0) for s in half]), 3)
            for name in names
        }


def _occupancy(stats: EngineStats) -> dict[str, int]:
    return {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "blocks_used": stats.kv_blocks_used,
        "slots_pinned": stats.slots_pinned,
        "host_cache_entries": stats.host_cache_entries,
        "preemptions": stats.preemptions_total,
    }


def _device_memory(stats: EngineStats) -> dict[str, float]:
    """What the GPU has taken, by all that use it; nothing on a CPU, where `engine_mb` holds it."""
    if "free" not in stats.memory_bytes:
        return {}
    held = sum(stats.memory_bytes.values()) - stats.memory_bytes["free"]
    return {"device_mb": round(held / 1e6, 2)}


def _is_idle(stats: EngineStats) -> bool:
    return stats.num_running + stats.num_waiting + stats.kv_blocks_used + stats.slots_pinned == 0


if __name__ == "__main__":
    sys.exit(main())
