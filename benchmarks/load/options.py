"""What the benchmarks of the running service let one choose about it."""

from __future__ import annotations

import argparse


def add_stack_options(parser: argparse.ArgumentParser, *, slots: int, workers: int = 1) -> None:
    parser.add_argument("--slots", type=int, default=slots, help="adapters on the device at once")
    parser.add_argument("--workers", type=int, default=workers, help="API processes")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--method", default="lora_xs", help="of the default basis")
    parser.add_argument("--model", help="directory or hub id; default: the bundled one")


def stack_environment(arguments: argparse.Namespace) -> dict[str, str]:
    chosen = {
        "TESSERA_ENGINE_NUM_SLOTS": str(arguments.slots),
        "TESSERA_SERVICE_WORKERS": str(arguments.workers),
        "TESSERA_RANK": str(arguments.rank),
        "TESSERA_METHOD": arguments.method,
    }
    return chosen if arguments.model is None else {**chosen, "TESSERA_BASE_MODEL": arguments.model}
