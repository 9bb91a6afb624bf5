"""Lists of work by name. What comes first is worth most: time may end before the list."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.quality.cases import CASES
from benchmarks.quality.data import personal_name
from benchmarks.quality.full_list import PERSONAL, full_list
from benchmarks.quality.peers import PEERS
from benchmarks.quality.settings import Settings
from benchmarks.quality.work import Task
from tessera.errors import InvalidInput
from tessera.methods.forms import LORA_PRESETS

#: What `--methods` is, unless given.
DEFAULT_METHODS = (
    "lora_xs", "lora_xs_bottom", "random", "loram", "eva", "gradient_svd", "lora_sb", "lora_da", "lora:lora",
    "lora:pissa", "lora:lora_fa",
)  # fmt: skip
#: Bases of W alone or of nothing: one serves all data sets at once.
_FREE = ("lora_xs", "random", "lora_xs_orth", "xs_random", "lora_xs_bottom", "lora_xs_bottom_orth")
_AWARE = ("lora_sb", "gradient_svd", "lora_da", "lora_sb_zero")
_LORA = ("lora", "rslora", "lora_plus", "lora_one", "lora_da", "eva")
_SUBTRACTED = ("pissa", "milora", "olora", "loram", "loram_pissa", "loram_milora", "loram_orthogonal",
               "loram_gaussian")  # fmt: skip
_FROZEN = ("lora_fa", "lora_fa_orthogonal", "eva_fa", "lora_da_fa")
_ONLINE = ("lolora", "lolora_svd", "lolora_ae", "lolora_softhebb", "lolora_uncentred")
_DA_PARTS = ("lora_da_no_bias", "lora_da_no_variance", "lora_da_no_fisher")
_SB_COUNTS = tuple(f"lora_sb_n{count}" for count in (1, 5, 25, 100, 400))
_OTHERS = ("loram", "pissa", "eva_grad", "eva", "lolora", "corda", "olora", "milora", "lora_ga", "lora_one",
           "lora_sb_paper", "lora_da_zero", "lora_da_repo", "loram_orth")  # fmt: skip
#: What PEFT's peers are tried at, one run after another: the three that were best for LoRA.
_PEER_RATES = (3e-4, 1e-3, 3e-3)


def all_of(
    methods: Sequence[str], ranks: Sequence[int], seeds: Sequence[int], data: Sequence[str]
) -> list[Task]:
    """Every method at every rank. Raises `InvalidInput` naming the known methods."""
    tasks = [Task("base", tuple(data))]
    known: dict[str, Mapping[str, object]] = {"": CASES, "lora": LORA_PRESETS, "peft": dict.fromkeys(PEERS)}
    for method, rank in itertools.product(methods, ranks):
        form, _, name = method.rpartition(":")
        if name not in known.get(form, {}):
            names = ", ".join(f"{f}:{n}" if f else n for f, cases in known.items() for n in cases)
            raise InvalidInput(f"unknown method {method!r}; known: {names}", param="methods")
        tasks += expand(Task(_KINDS[form], tuple(data), (name,), rank, tuple(seeds)))
    return tasks


_KINDS: dict[str, Any] = {"": "core", "lora": "lora", "peft": "peft"}


def expand(task: Task) -> Iterator[Task]:
    """A task for each data set, unless one basis serves them all."""
    if task.kind == "core" and not CASES[task.cases[0]].needs_data:
        yield task
        return
    for name in task.data:
        yield replace(task, data=(name,))


def h100_9min(data: Sequence[str]) -> list[Task]:
    """For one H100, four processes, a model of 25 M parameters and 500 seconds.

    The first data set gets everything; the others what shows whether an ordering is the data's.
    """
    main, others, seeds = tuple(data[:1]), tuple(data[1:]), (0, 1)

    def cores(names: Sequence[str], rank: int, sets: tuple[str, ...]) -> list[Task]:
        return [t for name in names for t in expand(Task("core", sets, (name,), rank, seeds))]

    def lora(names: tuple[str, ...], rank: int, sets: tuple[str, ...] = main) -> list[Task]:
        return [Task("lora", (name,), names, rank, seeds) for name in sets]

    def online(names: tuple[str, ...]) -> list[Task]:
        """One seed: all runs of a step go through the model at once, and each has its own rules to follow."""
        return [Task("lora", main, names, 16, (0,))]

    def peers(names: Sequence[str]) -> list[Task]:
        return [Task("peft", main, (name,), 16, (0,), _PEER_RATES) for name in names]

    return [
        Task("base", tuple(data)),
        *lora(_LORA[:3], 16), *lora(_LORA[3:], 16), *lora(_SUBTRACTED[:4], 16),
        *peers(("lora", "pissa")),
        *cores(_FREE[:2], 16, tuple(data)), *cores(_AWARE[:3], 16, main),
        *cores(_FREE[:2], 4, tuple(data)), *cores(_AWARE[:3], 4, main),
        *lora(("lora",), 4),
        Task("retention", main),
        *cores(_FREE[2:], 4, tuple(data)), *cores(_AWARE[3:], 4, main),
        *lora(_FROZEN, 16), *online(_ONLINE[:3]), *online(_ONLINE[3:]), *lora(("pissa_fa",), 16),
        *cores(("sb_noise", "sb_usv"), 4, main), *cores(_SB_COUNTS, 4, main),
        *lora(_DA_PARTS, 16), *cores((*_DA_PARTS, "lora_da_n16", "lora_da_n1024"), 4, main),
        *peers(("eva", "olora", "corda", "lora_ga")),
        *lora(("lora",), 16, others), *cores(_AWARE[:3], 16, others),
        *cores(_FREE[2:], 16, tuple(data)), *lora(_SUBTRACTED[4:], 16),
        *lora(("lora",), 64), *cores(("lora_xs",), 64, main), *cores(("lora_sb",), 64, main),
        *cores(("lora_xs",), 2, main), *cores(("lora_sb",), 2, main),
        Task("recall", main, (), 16, (0,), (3e-3,)), Task("precision", main, ("lora_xs",), 16),
        *cores(_OTHERS, 16, main), *cores(_AWARE[:3], 4, others), *lora(("corda", "lora_ga"), 16),
        *cores(("xs_svd_of_random", "lora_xs_middle_orth"), 4, main),
        *lora(("pissa", "milora", "olora", "loram"), 16, others),
    ]  # fmt: skip


def cpu_smoke(data: Sequence[str]) -> list[Task]:
    """A little of everything, for the bundled model on one core."""
    main, seeds = tuple(data[:1]), (0,)
    cores = [t for name in ("lora_xs", "random", "lora_sb", "lora_da")
             for t in expand(Task("core", main, (name,), 4, seeds))]  # fmt: skip
    return [
        Task("base", tuple(data)),
        Task("lora", main, ("lora", "lora_fa"), 4, seeds),
        Task("lora", main, ("pissa",), 4, seeds),
        *cores,
        Task("retention", main),
        Task("peft", main, ("lora",), 4, seeds),
    ]


def all_cases(data: Sequence[str]) -> list[Task]:
    """Everything once, at the smallest size: does it run? The figures mean nothing."""
    main, own, seeds = tuple(data[:1]), tuple(personal_name(name) for name in data[:1]), (0,)
    return [
        Task("base", (*data, *own)),
        *(Task("core", main, (name,), 4, seeds) for name in CASES),
        *(Task("core", own, (name,), 4, seeds) for name in PERSONAL),
        *(Task("lora", main, (name,), 4, seeds) for name in LORA_PRESETS),
        *(Task("peft", main, (name,), 4, seeds) for name in PEERS),
        *(Task(kind, main, (), 4, seeds) for kind in ("retention", "samples", "recall")),
        Task("precision", main, ("lora_xs",), 4, seeds),
    ]


#: Name: the list, and what differs from the default settings.
PRESETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "h100-9min": (
        h100_9min,
        {"by_length": True, "is_fast": True, "svd": "randomised", "token_budget": 16_384},
    ),
    "h100-20min": (
        full_list,
        {"by_length": True, "is_fast": True, "svd": "randomised", "token_budget": 16_384},
    ),
    "cpu-all": (
        all_cases,
        {"examples": 40, "validation": 12, "epochs": 1, "batch_size": 8, "max_tokens": 64, "calibration": 16,
         "rates": (1e-2,), "lora_rates": (1e-3,)},
    ),
    "cpu-smoke": (
        cpu_smoke,
        {"examples": 64, "validation": 24, "epochs": 1, "batch_size": 8, "calibration": 32,
         "rates": (3e-3, 3e-2), "lora_rates": (1e-4, 1e-3)},
    ),
}  # fmt: skip


def with_preset(settings: Settings, name: str) -> Settings:
    """The settings of a preset on top. Raises `InvalidInput`."""
    if name not in PRESETS:
        raise InvalidInput(f"unknown preset {name!r}; known: {', '.join(PRESETS)}", param="preset")
    return replace(settings, **PRESETS[name][1])
