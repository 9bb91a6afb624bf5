"""T9 to T15: LoRA-DA (002), LoRAM (003) and LoLoRA (000), in the LoRA form that they are published in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.quality.claims import MODES, Claim, Finding, better, chain, equal, setting
from benchmarks.quality.claims_core import larger_at_small_rank
from benchmarks.quality.results import Mode, Results

#: Bases that differ in their directions only, in the r x r form (T13).
DIRECTIONS = ("lora_xs_orth", "lora_xs_bottom_orth", "loram_orth", "random", "lora_sb_zero", "gradient_svd")
LORAM_DIRECTIONS = ("lora:loram", "lora:loram_orthogonal", "lora:loram_gaussian")
#: What T12 orders, and whose spread shrinks with tuning.
WEIGHT_DRIVEN = ("lora:loram", "lora:pissa", "lora:olora", "lora:lora", "lora:milora")


def t9(results: Results) -> Iterator[Finding]:
    yield from chain(results, "lora:lora_da", "lora:lora_one", "lora:pissa")
    yield from equal(results, "lora:pissa", "lora:lora")
    yield from better(results, "lora:lora", "lora:milora")
    yield from better(results, "lora:lora_da_fa", "lora:lora_fa")
    yield from better(results, "lora_da", "random")  # both factors frozen
    yield from better(results, "lora_da", "lora_xs")


def t10(results: Results) -> Iterator[Finding]:
    ablations: list[Finding] = []
    for prefix in ("lora:lora_da", "lora_da"):
        names = (prefix, *(f"{prefix}_{missing}" for missing in ("no_bias", "no_variance", "no_fisher")))
        ablations += chain(results, *names)
    if not ablations:
        return  # the rest is no verdict on them
    yield from ablations
    yield from better(results, "lora_da", "lora_da_n16")
    yield from better(results, "lora_da_n1024", "lora_da_n16")
    yield from larger_at_small_rank(results, "lora_da", "random")
    for data, rank in results.settings:
        gains = {}
        for place in ("ffn", "attention"):
            da, random = (results.loss(data, f"{case}_{place}", rank) for case in ("lora_da", "random"))
            if da is not None and random is not None:
                gains[place] = random.mean - da.mean
        if len(gains) == 2:
            text = f"gain over random factors: FFN {gains['ffn']:+.3f}, attention {gains['attention']:+.3f}"
            margin = gains["ffn"] - gains["attention"]
            yield Finding(setting(data, rank), "best", margin > 0, text, margin)


def t11(results: Results) -> Iterator[Finding]:
    for data, rank in results.settings:
        one, da = (results.loss(data, f"lora:{name}", rank) for name in ("lora_one", "lora_da"))
        if one is None or da is None:
            continue
        early = [
            results.early_loss(data, f"lora:{name}", rank, loss.rate)
            for name, loss in (("lora_one", one), ("lora_da", da))
        ]
        if early[0] is not None and early[1] is not None:
            text = f"training loss of the first tenth: LoRA-One {early[0]:.3f}, LoRA-DA {early[1]:.3f}"
            yield Finding(setting(data, rank), "best", early[0] < early[1], text)
        text = f"at the end: LoRA-DA {da}; LoRA-One {one}"
        yield Finding(setting(data, rank), "best", da.mean < one.mean, text)


def t12(results: Results) -> Iterator[Finding]:
    loram, pissa, olora, lora, milora = WEIGHT_DRIVEN
    yield from better(results, loram, pissa, ties=True)
    yield from chain(results, pissa, olora, lora)
    yield from better(results, lora, milora, ties=True)
    yield from better(results, "lora:rslora", lora)
    for data, rank in results.settings:
        untuned, tuned = (spread(results, data, rank, WEIGHT_DRIVEN, mode) for mode in MODES)
        if untuned is not None and tuned is not None:
            text = f"spread of the five: {untuned:.3f} untuned, {tuned:.3f} tuned"
            yield Finding(setting(data, rank), "best", tuned < untuned, text)


def t13(results: Results) -> Iterator[Finding]:
    for data, rank in results.settings:
        for mode in MODES:
            free = spread(results, data, rank, LORAM_DIRECTIONS, mode)
            frozen = spread(results, data, rank, DIRECTIONS, mode)
            if free is not None and frozen is not None:
                text = f"spread over directions: LoRA form {free:.3f}, r x r {frozen:.3f}"
                yield Finding(setting(data, rank), mode, free < frozen, text)
            for method in ("pissa", "milora"):
                losses = [
                    results.loss(data, f"lora:{name}", rank, mode)
                    for name in (f"loram_{method}", method, "lora")
                ]
                tracking, tracked, lora = losses
                if tracking is None or tracked is None or lora is None:
                    continue
                apart, gap = abs(tracking.mean - tracked.mean), abs(tracked.mean - lora.mean)
                shown = f"{tracking.mean:.3f}, {method} {tracked.mean:.3f}, LoRA {lora.mean:.3f}"
                text = f"LoRAM tracking {method}: {shown}"
                yield Finding(setting(data, rank), mode, apart <= max(0.02, gap / 2), text)


def t14(results: Results) -> Iterator[Finding]:
    yield from better(results, "lora:eva_fa", "lora:lora_fa")
    yield from equal(results, "lora:lora_fa", "lora:lora_fa_orthogonal", modes=("best",))
    yield from better(results, "lora:lora_fa", "lora:pissa_fa")
    for name in ("lolora", "lolora_svd", "lolora_ae"):
        yield from equal(results, f"lora:{name}", "lora:eva_fa", modes=("best",))
    yield from better(results, "lora:lolora", "lora:lolora_uncentred")
    yield from better(results, "lora:lolora", "lora:lolora_softhebb")
    yield from better(results, "lora:lora", "lora:eva_fa")


def t15(results: Results) -> Iterator[Finding]:
    for data in results.datasets:
        rows = {kind: results.probe("recall", data=data, B=kind) for kind in ("frozen", "trained")}
        if not (rows["frozen"] and rows["trained"]):
            continue
        frozen = sorted(rows["frozen"], key=lambda row: row["step"])
        trained = sorted(rows["trained"], key=lambda row: row["step"])
        gaps = [row["hpca"] - row["eva"] for row in frozen]
        text = f"B = 0: HPCA's error above EVA's {gaps[0]:.3f} at the start, {gaps[-1]:.3f} at the end"
        yield Finding(f"{data}, r = {frozen[0]['rank']}", "", gaps[-1] < gaps[0] / 4, text)
        text = (
            f"HPCA's error at the end: {frozen[-1]['hpca']:.3f} with B = 0, {trained[-1]['hpca']:.3f} with B"
        )
        holds = trained[-1]["hpca"] > frozen[-1]["hpca"]
        yield Finding(f"{data}, r = {frozen[0]['rank']}", "", holds, text)


def spread(results: Results, data: str, rank: int, cases: Sequence[str], mode: Mode) -> float | None:
    """The largest loss less the smallest; None unless all were measured."""
    losses = [results.loss(data, case, rank, mode) for case in cases]
    known = [loss.mean for loss in losses if loss is not None]
    return max(known) - min(known) if len(known) == len(cases) else None


LORA_CLAIMS = (
    Claim(
        "T9",
        "LoRA-DA beats LoRA-One beats PiSSA ≈ LoRA beats MiLoRA; with A frozen it beats LoRA-FA (here "
        "also: with both frozen, random and LoRA-XS)",
        "LoRA-DA, tables 2-4",
        t9,
    ),
    Claim(
        "T10",
        "LoRA-DA beats itself without bias, that without variance, that without Fisher; more examples "
        "help; it gains more in the FFN than in attention, and at small rank",
        "LoRA-DA, tables 7-9 and figure 4",
        t10,
    ),
    Claim("T11", "LoRA-One falls faster in the first steps, LoRA-DA wins later", "LoRA-DA, section 5.3", t11),
    Claim(
        "T12",
        "LoRAM ≥ PiSSA > OLoRA > LoRA ≥ MiLoRA and rsLoRA > LoRA at a fixed small rate; the spread "
        "shrinks when the rate is tuned",
        "LoRAM, tables 1 and 4",
        t12,
    ),
    Claim(
        "T13",
        "In LoRA form the directions matter little next to their size, less than in the r x r form; "
        "tracking a method's size gives its loss",
        "LoRAM, table 4",
        t13,
    ),
    Claim(
        "T14",
        "With A frozen: EVA < uniform = orthogonal < PiSSA in loss; HPCA, its start by SVD and AE equal "
        "EVA; uncentred and SoftHebb are worse; LoRA is best",
        "LoLoRA, tables 5-6",
        t14,
    ),
    Claim(
        "T15",
        "HPCA's recall error converges to EVA's while B = 0, and rises when B trains",
        "LoLoRA, figures 2-3",
        t15,
    ),
)
