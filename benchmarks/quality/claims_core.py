"""T1 to T8: LoRA-XS (004) and LoRA-SB (001), in the r x r form that they are published in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.quality.cases import SB_COUNTS
from benchmarks.quality.claims import MODES, Claim, Finding, better, chain, setting
from benchmarks.quality.results import Mode, Results


def t1(results: Results) -> Iterator[Finding]:
    yield from better(results, "lora_xs", "xs_random")
    yield from better(results, "lora_xs_orth", "random")
    yield from better(results, "xs_random", "xs_svd_of_random", ties=True)
    yield from larger_at_small_rank(results, "lora_xs", "xs_random")


def t2(results: Results) -> Iterator[Finding]:
    yield from better(results, "lora_xs", "lora_xs_bottom")
    yield from better(results, "lora_xs_orth", "lora_xs_bottom_orth")


def t3(results: Results) -> Iterator[Finding]:
    yield from better(results, "lora_xs", "lora_xs_orth")
    for data, rank in results.settings:
        a, b = (results.loss(data, case, rank) for case in ("lora_xs", "lora_xs_orth"))
        if a is not None and b is not None:
            text = f"best rate with Σ {a.rate:g}, without {b.rate:g}"
            yield Finding(setting(data, rank), "best", a.rate < b.rate, text)


def t4(results: Results) -> Iterator[Finding]:
    for data in results.datasets:
        for case in ("lora_xs", "lora_sb", "lora:lora"):
            found = [(rank, results.loss(data, case, rank)) for rank in results.ranks(data)]
            measured = [(rank, loss) for rank, loss in found if loss is not None]
            for (small, a), (large, b) in itertools.pairwise(measured):
                text = f"{case}: r = {small} {a.mean:.3f}, r = {large} {b.mean:.3f}"
                yield Finding(data, "best", b.mean < a.mean, text)


def t5(results: Results) -> Iterator[Finding]:
    for data in results.datasets:
        base = results.probe("retention", data=data, group="none")
        if not base:
            continue
        for fraction in sorted(
            {row["fraction"] for row in results.probe("retention", data=data, group="qkv")}
        ):
            rise = {
                (row["group"], row["part"]): row["loss"] - base[0]["loss"]
                for row in results.probe("retention", data=data, fraction=fraction)
            }
            top, middle, bottom = (rise["qkv", part] for part in ("top", "middle", "bottom"))
            shown = f"top +{top:.2f}, middle +{middle:.2f}, bottom +{bottom:.2f}"
            where = f"{data}, {fraction:.0%} of the singular values"
            yield Finding(where, "", top < min(middle, bottom), f"q, k, v: {shown}")
            ffn = rise["ffn_in", "top"]
            text = f"the top of gate and up is not enough: +{ffn:.2f} against +{top:.2f} for q, k, v"
            yield Finding(where, "", ffn > top, text)


def t6(results: Results) -> Iterator[Finding]:
    yield from better(results, "lora_sb", "lora_xs")
    yield from larger_at_small_rank(results, "lora_sb", "lora_xs")
    for data, rank in results.settings:
        a, b = (results.loss(data, case, rank) for case in ("lora_sb", "lora_xs"))
        if a is None or b is None:
            continue
        first = results.early_loss(data, "lora_sb", rank, a.rate)
        second = results.early_loss(data, "lora_xs", rank, b.rate)
        if first is not None and second is not None:
            text = f"training loss of the first tenth: LoRA-SB {first:.3f}, LoRA-XS {second:.3f}"
            yield Finding(setting(data, rank), "best", first < second, text)


def t7(results: Results) -> Iterator[Finding]:
    for data, rank in results.settings:
        for mode in MODES:
            losses = {count: results.loss(data, f"lora_sb_n{count}", rank, mode) for count in SB_COUNTS}
            known = {count: loss.mean for count, loss in losses.items() if loss is not None}
            if not {1, 25, 400} <= set(known):
                continue
            before, after = known[1] - known[25], known[25] - known[400]
            shown = ", ".join(f"{count}: {loss:.3f}" for count, loss in known.items())
            text = f"examples {shown}; from 1 to 25 {before:+.3f}, from 25 to 400 {after:+.3f}"
            yield Finding(setting(data, rank), mode, after < before / 5, text)
    yield from caught_energy(results)


def caught_energy(results: Results) -> Iterator[Finding]:
    """Of a fresh gradient, what a basis from 25 examples catches next to one from 400."""
    for data in results.datasets:
        shares = {row["examples"]: row["share"] for row in results.probe("samples", data=data)}
        if {1, 25, 400} <= set(shares):
            shown = ", ".join(f"{count}: {share:.3f}" for count, share in sorted(shares.items()))
            text = f"share of a held-out gradient's energy in the basis of so many examples {shown}"
            gained = shares[25] - shares[1], shares[400] - shares[25]
            yield Finding(data, "", gained[1] < gained[0] / 5, text)


def t8(results: Results) -> Iterator[Finding]:
    yield from chain(results, "lora_sb_zero", "sb_noise", "random")
    yield from better(results, "lora_sb", "sb_usv")


def larger_at_small_rank(results: Results, first: str, second: str) -> Iterator[Finding]:
    """The margin of the first over the second falls from the smallest to the largest rank measured."""
    for data in results.datasets:
        for mode in MODES:
            gaps = margins(results, data, first, second, mode)
            if len(gaps) < 2:
                continue
            ranks = sorted(gaps)
            shown = ", ".join(f"r = {rank} {gaps[rank]:+.3f}" for rank in ranks)
            text = f"margin of {first} over {second}: {shown}"
            yield Finding(data, mode, gaps[ranks[0]] > gaps[ranks[-1]], text)


def margins(results: Results, data: str, first: str, second: str, mode: Mode) -> dict[int, float]:
    """By rank, how much lower the first one's loss is."""
    gaps = {}
    for rank in results.ranks(data):
        a, b = results.loss(data, first, rank, mode), results.loss(data, second, rank, mode)
        if a is not None and b is not None:
            gaps[rank] = b.mean - a.mean
    return gaps


CORE_CLAIMS = (
    Claim(
        "T1",
        "The SVD of W beats random factors, most at small rank; the SVD of random is no better than random",
        "LoRA-XS, tables 4 and 14",
        t1,
    ),
    Claim("T2", "Top singular vectors beat bottom ones", "LoRA-XS, tables 16-19", t2),
    Claim("T3", "With Σ in A is better, and its best rate is lower", "LoRA-XS, tables 20-23", t3),
    Claim("T4", "The loss falls with the rank", "LoRA-XS, tables 1 and 3", t4),
    Claim(
        "T5",
        "The top 10 to 25 % of the singular values of q, k, v keep the model working, the middle or "
        "bottom do not; the FFN's top does not suffice",
        "LoRA-XS, tables 6-8",
        t5,
    ),
    Claim(
        "T6",
        "LoRA-SB beats LoRA-XS at equal rank, from the first steps on, most at small rank",
        "LoRA-SB, table 3 and figure 2",
        t6,
    ),
    Claim(
        "T7",
        "25 examples are enough for LoRA-SB's start (more gain less than a fifth of what 25 gain over 1)",
        "LoRA-SB, table 5",
        t7,
    ),
    Claim(
        "T8",
        "SVD of ΔW beats ΔW with noise beats random, all orthonormal; B = U S, R = I is worse than "
        "B = U, R = S",
        "LoRA-SB, table 4 and section 4",
        t8,
    ),
)
