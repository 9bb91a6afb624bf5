"""How does the service hold up under load? Open-loop HTTP, bursts, adapters popular by Zipf's law.

    python -m benchmarks.serving.server [--adapters 1000 10000] [--cv 1 4] [--rate 4] [--duration-s 20]
        [--json FILE]

Requests are sent at their time, whether or not earlier ones have been answered. The gaps are Gamma
distributed (cv 1: Poisson, 4: bursts), and latencies count from the moment at which a request was due. All
adapters are in the store, and names are drawn from them by Zipf's law. API processes, engine and embedded
store all run. Hit rates say where a request's adapter was when the request arrived.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load.adapters import adapter_name, store_adapters
from benchmarks.load.arrivals import Zipf, gamma_arrivals
from benchmarks.load.client import Outcome, Prompt, complete
from benchmarks.load.figures import errors, hit_rates, latencies
from benchmarks.load.options import add_stack_options, stack_environment
from benchmarks.load.stack import ServiceStack, running_stack
from benchmarks.report import print_table, save
from service.engine.client.attachment import AttachedEngine
from tessera.redis.client import connect
from tessera.store.bases import BasisStore

WARM_UP_REQUESTS = 8
PERCENTILES = (50, 95, 99)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=[1000, 10_000], help="stored adapters")
    parser.add_argument("--cv", type=float, nargs="+", default=[1.0, 4.0], help="burstiness of arrivals")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the popularity")
    parser.add_argument("--duration-s", type=float, default=20.0)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[8, 64], help="least and most")
    parser.add_argument("--output-tokens", type=int, nargs=2, default=[8, 32], help="least and most")
    add_stack_options(parser, slots=64)
    parser.add_argument("--timeout-s", type=float, default=120.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    rows = []
    with running_stack(stack_environment(arguments)) as stack:
        for num_adapters in arguments.adapters:
            asyncio.run(fill_store(stack, num_adapters))
            rows += [asyncio.run(run_load(stack, arguments, num_adapters, cv)) for cv in arguments.cv]
    print_table(rows)
    save(arguments.json, question=__doc__.splitlines()[0], arguments=vars(arguments), rows=rows)


async def default_basis_id(stack: ServiceStack) -> str:
    engine = AttachedEngine(stack.engine_socket, heartbeat_timeout_s=60.0)
    await engine.start()
    try:
        return (await engine.wait_ready(60.0)).default_basis_id
    finally:
        await engine.close()


async def fill_store(stack: ServiceStack, count: int) -> None:
    """Adapters `z<count>-<rank>`, rank 0 the most popular."""
    async with connect(stack.store_url, timeout_s=60.0) as redis:
        manifest = await BasisStore(redis).manifest(await default_basis_id(stack))
        await store_adapters(redis, manifest, prefix=f"z{count}", count=count)


async def run_load(
    stack: ServiceStack, arguments: argparse.Namespace, num_adapters: int, cv: float
) -> dict[str, Any]:
    rng = np.random.default_rng([num_adapters, round(100 * cv)])
    times = gamma_arrivals(rng, rate=arguments.rate, cv=cv, duration_s=arguments.duration_s)
    ranks = Zipf(num_adapters, arguments.zipf).draw(rng, len(times))
    prompts = [draw_prompt(rng, arguments, adapter_name(f"z{num_adapters}", rank)) for rank in ranks]
    for index in range(WARM_UP_REQUESTS):  # of the model alone: adapters stay where they are
        await complete(stack.port, Prompt(stack.base_name(), [index + 5], 2), timeout_s=arguments.timeout_s)
    before = stack.metrics()
    outcomes, elapsed_s = await send_all(stack.port, times, prompts, arguments.timeout_s)
    hits = hit_rates(before, stack.metrics(), len(prompts))
    tokens = sum(outcome.num_tokens for outcome in outcomes)
    return {
        "adapters": num_adapters,
        "cv": cv,
        "requests": len(prompts),
        "distinct": len(set(ranks)),
        "requests_per_s": round(len(prompts) / elapsed_s, 2),
        "output_tokens_per_s": round(tokens / elapsed_s, 1),
        **latencies(outcomes, *PERCENTILES),
        **hits,
        "errors": errors(outcomes),
    }


def draw_prompt(rng: np.random.Generator, arguments: argparse.Namespace, model: str) -> Prompt:
    length = int(rng.integers(arguments.prompt_tokens[0], arguments.prompt_tokens[1] + 1))
    max_tokens = int(rng.integers(arguments.output_tokens[0], arguments.output_tokens[1] + 1))
    return Prompt(model, [int(token) for token in rng.integers(5, 1000, length)], max_tokens)


async def send_all(
    port: int, times: list[float], prompts: list[Prompt], timeout_s: float
) -> tuple[list[Outcome], float]:
    """Send each prompt at its time; what became of each, and the seconds until the last answer."""
    start = time.monotonic()

    async def send(due_at: float, prompt: Prompt) -> Outcome:
        await asyncio.sleep(max(0.0, due_at - time.monotonic()))
        return await complete(port, prompt, timeout_s=timeout_s, due_at=due_at)

    tasks = [send(start + at, prompt) for at, prompt in zip(times, prompts, strict=True)]
    outcomes = await asyncio.gather(*tasks)
    return list(outcomes), time.monotonic() - start


if __name__ == "__main__":
    main()
