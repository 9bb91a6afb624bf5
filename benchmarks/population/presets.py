"""Lists of tasks by name, the most informative first, because time may run out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.population.tasks import Task
from benchmarks.population.users import Sizes

BOTH = ("zero", "population")
LORA_RANK = 16
#: Part of every learning task, so that records from before users were held out belong to other tasks.
HELD_OUT = {"held_out": 0.15}


@dataclass(frozen=True)
class Casting:
    """How a cast is made of the files. seeds: of newcomers' trainings, by their number of examples.

    num_seen: so many of --data are seen by the population, the others give newcomers only; None: all are.
    """

    sizes: Sizes
    seeds: Mapping[int, Sequence[int]]
    num_seen: int | None = None


@dataclass(frozen=True)
class Preset:
    """The tasks, and what they share. casts: by the name that tasks use. max_examples: of a file."""

    tasks: Sequence[Task]
    casts: Mapping[str, Casting]
    token_budget: int
    is_fast: bool
    rates: Sequence[float]
    lora_rates: Sequence[float]
    max_examples: int | None = None


def learned(name: str, rank: int, options: Mapping[str, Any], cast: str = "main") -> Task:
    label = f"learned, {name}" if name else "learned"
    return Task(label, "basis", rank, "population", "users", cast, dict(options), BOTH)


def lora(cast: str = "main") -> Task:
    return Task("lora", "lora", LORA_RANK, cast=cast)


def pooled(rank: int, cast: str = "main", options: Mapping[str, Any] | None = None) -> Task:
    return Task("pooled gradient", "basis", rank, "gradient_svd", "pooled", cast, dict(options or {}))


def h100_150s() -> list[Task]:
    """For one H100, four processes, a model of 25 M parameters and 150 seconds.

    Ten passes at a basis rate of 3e-2, the tasks called "learned" of an earlier run, learn by heart; here
    users held out may end them.
    """
    fast = {"svd": "randomised"}
    few: dict[str, Any] = {**fast, **HELD_OUT, "passes": 3.0, "basis_rate": 1e-2, "retract_every": 0}
    return [
        learned("3 passes", 16, few),
        learned("3 passes", 64, few),
        lora(),
        pooled(16, options=fast),
        learned("6 passes", 16, {**few, "passes": 6.0}),
        learned("10 passes, faster basis", 16, {**few, "passes": 10.0, "basis_rate": 3e-2}),
        learned("6 passes", 64, {**few, "passes": 6.0}),
        learned("3 passes", 16, few, "whole"),
        lora("whole"),
        pooled(64, options=fast),
        learned("3 passes, nobody held out", 16, {**few, "held_out": 0.0}),
        learned("3 passes, faster basis", 16, {**few, "basis_rate": 3e-2}),
        learned("3 passes, orthonormal", 16, {**few, "retract_every": 8}),
        learned("3 passes, jointly", 16, {**few, "num_slots": 0, "batch_size": 1, "episode_steps": 0}),
        learned("3 passes, no start", 16, {**few, "start_rate": 0.0}),
        Task("lora after the population's", "pooled_lora", LORA_RANK),
        Task("lora_xs", "basis", 16, "lora_xs", options={**fast, "with_sigma": False}),
        Task("own gradient", "basis", 16, "gradient_svd", "own", options=fast, starts=("zero", "gradient")),
    ]


def cpu_hour() -> list[Task]:
    """For the bundled model and one core."""
    short = {**HELD_OUT, "passes": 3.0}
    return [
        learned("", 16, short),
        lora(),
        learned("jointly", 16, {**short, "num_slots": 0, "batch_size": 1, "episode_steps": 0}),
        learned("lengths", 16, {**short, "retract_every": 0}),
        learned("faster R", 16, {**short, "core_rate": 2.5e-2}),
        learned("faster basis", 16, {**short, "basis_rate": 2.5e-2}),
        learned("longer episodes", 16, {**short, "episode_steps": 100}),
        pooled(16),
    ]


def smoke() -> list[Task]:
    """A little of everything."""
    return [
        Task("lora", "lora", 4),
        learned("", 4, {**HELD_OUT, "passes": 1.0, "episode_steps": 8}),
        pooled(4),
    ]


PRESETS: dict[str, Preset] = {
    "h100-150s": Preset(
        h100_150s(),
        {
            "main": Casting(Sizes(), {400: (0,), 50: (0, 1)}),
            # One population of one file; newcomers with as much as there is.
            "whole": Casting(Sizes(train=1600, test=160), {1600: (0,), 50: (0, 1)}, num_seen=1),
        },
        16_384, True,
        rates=(3e-3, 9e-3, 2.7e-2), lora_rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    ),
    "cpu-hour": Preset(
        cpu_hour(), {"main": Casting(Sizes(400, 64, 100, 0.25), {400: (0,), 50: (0,)})}, 2048, False,
        rates=(1.5e-2,), lora_rates=(1e-3,), max_examples=2000,
    ),
    "smoke": Preset(
        smoke(), {"main": Casting(Sizes(16, 8, 3), {16: (0,)})}, 2048, False,
        rates=(8e-3,), lora_rates=(1e-3,), max_examples=72,
    ),
}  # fmt: skip
