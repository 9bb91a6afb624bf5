"""The list that decides every ordering, for 20 minutes of one H100 and four processes.

Ordered so that a cut at any time leaves a useful report: first what every ordering needs for a verdict, then
ranks from 2 to 64 and a third seed, peers, other data sets, and the remaining methods. Runs that an earlier
list has measured (`--earlier`) are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.quality.cases import SB_COUNTS
from benchmarks.quality.data import personal_name
from benchmarks.quality.work import Task

SEEDS = (0, 1, 2)
#: What the earlier list has measured with two seeds gets its third later.
FIRST, THIRD = SEEDS[:2], SEEDS[2:]
#: Around what was best for each group (`learning_rates.py`), to spare time where the rate is
#: no longer the question: LoRA-DA at rank 4, PEFT's peers, local rules.
NEAR_RATES = (3e-3, 3e-2, 1e-1, 3e-1)
PEER_RATES = (3e-4, 1e-3, 3e-3)
ONLINE_RATES = (1e-3, 3e-3, 1e-2, 3e-2)

FREE = ("lora_xs", "random")
AWARE = ("lora_sb", "gradient_svd", "lora_da")
DA_PARTS = ("lora_da_no_bias", "lora_da_no_variance", "lora_da_no_fisher")
#: With one user's examples (P1).
PERSONAL = ("lora_da", "lora_da_no_variance", "lora_da_repo_units", "lora_sb", "lora_xs", "random",
            "gradient_svd")  # fmt: skip
ONLINE = ("lolora", "lolora_svd", "lolora_ae", "lolora_softhebb", "lolora_uncentred")
OTHERS = ("loram", "pissa", "eva_grad", "eva", "lolora", "corda", "olora", "milora", "lora_ga", "lora_one",
          "lora_sb_paper", "lora_da_zero", "lora_da_repo", "xs_svd_of_random",
          "lora_xs_middle_orth")  # fmt: skip


def cores(
    names: Sequence[str],
    rank: int,
    data: Sequence[str],
    seeds: tuple[int, ...] = SEEDS,
    rates: tuple[float, ...] | None = None,
) -> list[Task]:
    """A basis for each data set."""
    return [Task("core", (name,), (case,), rank, seeds, rates) for case in names for name in data]


def shared(
    names: Sequence[str], rank: int, data: tuple[str, ...], seeds: tuple[int, ...] = SEEDS
) -> list[Task]:
    """Bases that need no data: one trainer for all data sets."""
    return [Task("core", data, (case,), rank, seeds) for case in names]


def lora(
    names: tuple[str, ...], rank: int, data: Sequence[str], seeds: tuple[int, ...] = SEEDS
) -> list[Task]:
    return [Task("lora", (name,), names, rank, seeds) for name in data]


def peers(names: Sequence[str], data: tuple[str, ...], seeds: tuple[int, ...] = (0,)) -> list[Task]:
    return [Task("peft", data, (name,), 16, seeds, PEER_RATES) for name in names]


def full_list(data: Sequence[str]) -> list[Task]:
    """The first data set gets everything; the others what shows whether an ordering is the data's."""
    main, others = tuple(data[:1]), tuple(data[1:])
    own = tuple(personal_name(name) for name in main)
    return [
        Task("base", (*data, *own)), *known(data, FIRST), Task("retention", main),
        *missing(data), *by_rank(main), *known(data, THIRD),
        *peers(("lora", "pissa", "lora_ga", "eva", "olora", "corda"), main),
        *lora(("lora",), 16, others), *cores(AWARE, 16, others), *cores(AWARE, 4, others),
        *lora(("lora_plus", "eva"), 16, main), *lora(("corda", "lora_ga"), 16, main),
        *cores(PERSONAL, 4, own), *cores(OTHERS, 16, main),
        *shared(("xs_svd_of_random", "lora_xs_middle_orth"), 4, main),
        *(task for rank in (2, 8, 64)
          for task in (*shared(("random",), rank, main), *cores(("gradient_svd", "lora_da"), rank, main))),
        *peers(("lora", "pissa"), main, SEEDS), Task("precision", main, ("lora_xs",), 16),
        *cores(("lora_da_two_sided",), 16, main),  # its alternating eigenproblems take minutes
    ]  # fmt: skip


def known(data: Sequence[str], seeds: tuple[int, ...]) -> list[Task]:
    """T1 to T6, T9, T11 and T12, O1."""
    main, everywhere = tuple(data[:1]), tuple(data)
    return [
        *shared(FREE, 16, everywhere, seeds), *cores(AWARE, 16, main, seeds),
        *lora(("lora", "rslora", "lora_one"), 16, main, seeds), *lora(("lora_da",), 16, main, seeds),
        *lora(("pissa", "milora"), 16, main, seeds), *lora(("olora", "loram"), 16, main, seeds),
        *shared((*FREE, "lora_xs_bottom", "lora_xs_orth", "xs_random"), 4, everywhere, seeds),
        *cores((*AWARE, "lora_sb_zero"), 4, main, seeds), *lora(("lora",), 4, main, seeds),
    ]  # fmt: skip


def missing(data: Sequence[str]) -> list[Task]:
    """P1, T8, T7, T10, T13, T15, T14: what the earlier list did not reach."""
    main, everywhere = tuple(data[:1]), tuple(data)
    own = tuple(personal_name(name) for name in main)
    return [
        *cores(PERSONAL, 16, own), *lora(("lora",), 16, own), *cores(("sb_noise", "sb_usv"), 4, main),
        *cores([f"lora_sb_n{count}" for count in SB_COUNTS], 4, main), Task("samples", main, (), 4),
        *lora(DA_PARTS, 16, main), *cores(DA_PARTS, 4, main, rates=NEAR_RATES),
        *cores(("lora_da_ffn", "random_ffn", "lora_da_attention", "random_attention"), 4, main,
               rates=NEAR_RATES),
        *cores(("lora_da_n16", "lora_da_n1024"), 4, main, rates=NEAR_RATES),
        *lora(("loram_pissa", "loram_milora"), 16, main),
        *lora(("loram_orthogonal", "loram_gaussian"), 16, main),
        *shared(("lora_xs_orth", "lora_xs_bottom_orth", "loram_orth"), 16, main),
        *cores(("lora_sb_zero",), 16, main), Task("recall", main, (), 16, (0,), (3e-3,)),
        *lora(("lora_fa", "lora_fa_orthogonal", "eva_fa"), 16, main), *lora(("lora_da_fa",), 16, main),
        *lora(("pissa_fa",), 16, main),
        # One form each: all runs of a step go through the model at once.
        *(Task("lora", main, (name,), 16, SEEDS, ONLINE_RATES) for name in ONLINE),
        *shared(("lora_xs_bottom_orth",), 4, everywhere),
    ]  # fmt: skip


def by_rank(main: tuple[str, ...]) -> list[Task]:
    """T4: the loss against the rank, and against trained numbers."""
    return [
        task
        for rank in (64, 2, 8, 32)
        for task in (
            *shared(("lora_xs",), rank, main),
            *cores(("lora_sb",), rank, main),
            *lora(("lora",), rank, main),
        )
    ]
