"""How much does it cost when an adapter is only in the store? Time to first token, cold against resident.

    python -m benchmarks.serving.cold [--singles 40] [--burst 32] [--slots 32] [--json FILE]

Three comparisons, over HTTP against a running stack: one cold adapter at a time against the same adapter when
it is resident; a burst of cold adapters against the same burst when they are resident; and working sets of
0.5, 1, 2 and 4 times the slots. For the last, several clients draw adapters uniformly and send one request
after the other, after every adapter has been used once. Prompts never repeat, so the prefix cache plays no
part.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load.adapters import adapter_name, store_adapters
from benchmarks.load.client import Outcome, Prompt, complete
from benchmarks.load.figures import errors, hit_rates, latencies
from benchmarks.load.options import add_stack_options, stack_environment
from benchmarks.load.stack import ServiceStack, running_stack
from benchmarks.report import print_table, save
from benchmarks.serving.server import default_basis_id
from tessera.redis.client import connect
from tessera.store.bases import BasisStore

WORKING_SETS = (0.5, 1.0, 2.0, 4.0)
BURSTS = 3
PERCENTILES = (50, 99)
TIMEOUT_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--singles", type=int, default=40, help="cold adapters asked for one at a time")
    parser.add_argument("--burst", type=int, default=32, help="cold adapters asked for at once")
    parser.add_argument("--clients", type=int, default=4, help="for the working sets")
    parser.add_argument("--requests", type=int, default=200, help="per working set")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=4)
    add_stack_options(parser, slots=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with running_stack(stack_environment(arguments)) as stack:
        rows = asyncio.run(Cold(stack, arguments).run())
    print_table(rows)
    save(arguments.json, question=__doc__.splitlines()[0], arguments=vars(arguments), rows=rows)


class Cold:
    """The three questions to one stack."""

    def __init__(self, stack: ServiceStack, arguments: argparse.Namespace) -> None:
        self._stack = stack
        self._arguments = arguments
        self._rng = np.random.default_rng(0)
        self._fresh = self._fresh_names()

    async def run(self) -> list[dict[str, Any]]:
        arguments = self._arguments
        largest = int(max(WORKING_SETS) * arguments.slots)
        await self._fill("cold", arguments.singles + BURSTS * arguments.burst + 8)
        await self._fill("set", largest)
        for _ in range(8):  # the first steps of a process are slower
            await self._ask(self._stack.base_name())
        await self._ask(next(self._fresh))
        rows = await self._singles()
        rows += await self._bursts()
        rows += [await self._working_set(ratio) for ratio in WORKING_SETS]
        return rows

    async def _singles(self) -> list[dict[str, Any]]:
        cold, resident = [], []
        for _ in range(self._arguments.singles):
            name = next(self._fresh)
            cold.append(await self._ask(name))
            resident.append(await self._ask(name))
        return self._compare("one at a time", resident, cold)

    async def _bursts(self) -> list[dict[str, Any]]:
        cold, resident = [], []
        for _ in range(BURSTS):
            names = list(itertools.islice(self._fresh, self._arguments.burst))
            cold += await asyncio.gather(*(self._ask(name) for name in names))
            resident += await asyncio.gather(*(self._ask(name) for name in names))
        return self._compare(f"{self._arguments.burst} at once", resident, cold)

    async def _working_set(self, ratio: float) -> dict[str, Any]:
        size = max(1, int(ratio * self._arguments.slots))
        names = [adapter_name("set", index) for index in range(size)]
        for name in names:
            await self._ask(name)
        before = self._stack.metrics()
        wanted = iter([names[i] for i in self._rng.integers(0, size, self._arguments.requests)])
        outcomes: list[Outcome] = []

        async def client() -> None:
            for name in wanted:
                outcomes.append(await self._ask(name))

        await asyncio.gather(*(client() for _ in range(self._arguments.clients)))
        hits = hit_rates(before, self._stack.metrics(), len(outcomes))
        return {"what": f"working set {ratio:g} x slots", **self._figures(outcomes), **hits}

    def _compare(self, what: str, resident: list[Outcome], cold: list[Outcome]) -> list[dict[str, Any]]:
        """Rows for both, the second with what cold costs on top."""
        first, second = self._figures(resident), self._figures(cold)
        more = {
            f"more_p{p}_ms": round(second[f"ttft_p{p}_ms"] - first[f"ttft_p{p}_ms"], 2) for p in PERCENTILES
        }
        return [{"what": f"{what}, resident", **first}, {"what": f"{what}, cold", **second, **more}]

    def _figures(self, outcomes: list[Outcome]) -> dict[str, Any]:
        return {
            "requests": len(outcomes),
            **latencies(outcomes, *PERCENTILES),
            "errors": errors(outcomes),
        }

    async def _ask(self, model: str) -> Outcome:
        token_ids = [int(token) for token in self._rng.integers(5, 1000, self._arguments.prompt_tokens)]
        prompt = Prompt(model, token_ids, self._arguments.output_tokens)
        return await complete(self._stack.port, prompt, timeout_s=TIMEOUT_S)

    async def _fill(self, prefix: str, count: int) -> None:
        async with connect(self._stack.store_url, timeout_s=60.0) as redis:
            manifest = await BasisStore(redis).manifest(await default_basis_id(self._stack))
            await store_adapters(redis, manifest, prefix=prefix, count=count)

    def _fresh_names(self) -> Iterator[str]:
        for index in itertools.count():
            yield adapter_name("cold", index)


if __name__ == "__main__":
    main()
