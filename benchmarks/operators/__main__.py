"""What do adapters cost in layers without attention? Ratios to the bare layers: popularity x rank x tokens.

    python -m benchmarks.operators [--geometry 8b] [--tokens 1 32 256] [--ranks 16] [--json FILE]
    python -m benchmarks.operators --single      # each op alone
    python -m benchmarks.operators --tune        # the fastest tiles (CUDA)

On CUDA under CUDA graphs, 8B geometry, bfloat16; on a CPU small, in float32, with the reference ops. Peers on
the same weights and inputs: plain torch ops behind each GEMM, and LoRA of the same rank gathered per token.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device_time import time_in_turn
from benchmarks.operators.peers import Loras, lora, torch_ops
from benchmarks.operators.single import single_rows
from benchmarks.operators.stack import GEOMETRIES, Adapters, Step, Weights
from benchmarks.report import percentiles, print_table, save
from tests.popularity import POPULARITIES

#: LoRAs as peers only up to here: 256 of rank 16 take 11 GB in the 8B geometry, of rank 64 43 GB.
MAX_LORA_RANK = 16
#: All patterns at this rank; elsewhere every token its own adapter, the most expensive one.
POPULARITY_RANK = 16


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        rows = list(all_rows(arguments, device))
    print_table(rows)
    save(arguments.json, question=(__doc__ or "").splitlines()[0], arguments=vars(arguments), rows=rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    is_small = not torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small" if is_small else "8b")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 17] if is_small else [1, 8, 32, 128, 256]
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[16] if is_small else [8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=5 if is_small else 30)
    parser.add_argument("--single", action="store_true", help="each op alone")
    parser.add_argument("--tune", action="store_true", help="find the fastest tiles (CUDA only)")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.tune and is_small:
        parser.error("--tune needs a CUDA device")
    return arguments


def all_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = Weights(GEOMETRIES[arguments.geometry], device, dtype)
    for rank in arguments.ranks:
        adapters = Adapters(weights, rank, max(arguments.tokens))
        for num_tokens in arguments.tokens:
            step = Step(weights, num_tokens)
            if arguments.tune:
                from benchmarks.operators.tune import tune_rows

                yield from tune_rows(step, adapters, arguments.repeats)
            elif arguments.single:
                yield from single_rows(step, adapters, step.slots("distinct"), arguments.repeats)
            else:
                yield from stack_rows(step, adapters, arguments)


def stack_rows(step: Step, adapters: Adapters, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All ways in turn, round after round: a device that grows warm slows them all alike."""
    runs = dict(ways(step, adapters, arguments))
    again = {**runs, "bare again": runs["bare"]}
    rounds = time_in_turn(list(again.values()), device=step.weights.device, rounds=arguments.repeats)
    bare = statistics.median(rounds[0])
    for name, times in zip(again, rounds, strict=True):
        yield {
            "tokens": step.num_tokens,
            "rank": adapters.rank,
            "what": name,
            "ratio": round(statistics.median(times) / bare, 3),
            "us_per_layer": round(statistics.median(times) / step.weights.geometry.layers * 1e6, 2),
            **percentiles(times),
        }


def ways(
    step: Step, adapters: Adapters, arguments: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name, and a run over all layers."""
    distinct = step.slots("distinct")
    yield "bare", step.bare
    yield "bare, norms at once", partial(step.bare, puts_off=False)
    yield "A appended, no deltas", partial(step.appended, adapters)
    for popularity in POPULARITIES if adapters.rank == POPULARITY_RANK else ("distinct",):
        yield popularity, partial(step.adapted, adapters, step.slots(popularity))
    yield "distinct, norms at once", partial(step.adapted, adapters, distinct, puts_off=False)
    if arguments.without_peers:
        return
    yield "torch ops", torch_ops(step, adapters, distinct)
    if adapters.rank <= MAX_LORA_RANK:
        loras = Loras(step.weights, adapters.rank, step.num_tokens)
        yield "LoRA, distinct", lora(step, loras, distinct)


if __name__ == "__main__":
    main()
