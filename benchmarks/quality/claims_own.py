"""Orderings that are in no paper's table: what was seen before on this base model, and LoRA-DA's units."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.quality.claims import Claim, Finding, better, chain, setting
from benchmarks.quality.results import Results

#: A variance term below this part of the bias term decides nothing; above the other it does.
VOID_SHARE, DECISIVE_SHARE = 1e-2, 1e-1


def o1(results: Results) -> Iterator[Finding]:
    yield from chain(results, "lora:lora", "lora_sb", "lora_xs", "random", "lora_xs_bottom", modes=("best",))
    yield from better(results, "gradient_svd", "lora_xs", modes=("best",))


def p1(results: Results) -> Iterator[Finding]:
    """Where the variance matters: the settings with one user's few examples."""
    settings = results.personal_settings
    yield from better(results, "lora_da", "lora_da_no_variance", settings=settings)
    yield from better(results, "lora_da", "lora_da_repo_units", settings=settings)
    for data, rank in settings:
        builds = [results.build(data, case, rank) or {} for case in ("lora_da", "lora_da_repo_units")]
        shares = [build.get("notes", {}).get("variance_to_bias") for build in builds]
        if None in shares:
            continue
        ours, theirs = (float(share) for share in shares)
        text = f"variance to bias: {ours:.2g} in consistent units, {theirs:.2g} in the authors'"
        yield Finding(setting(data, rank), "", theirs < VOID_SHARE and ours > DECISIVE_SHARE, text)


OWN_CLAIMS = (
    Claim(
        "O1",
        "LoRA beats LoRA-SB and gradient SVD, which beat LoRA-XS, which beats random, which beats bottom "
        "vectors with their singular values",
        "seen before on this base model, with other texts",
        o1,
    ),
    Claim(
        "P1",
        "With 50 examples of one user LoRA-DA beats itself without its variance term, and the authors' "
        "units, in which that term is void",
        "derived: label tokens and a Fisher per token",
        p1,
    ),
)
