"""One table of each paper: its rows as requests of this service, its protocol, and what is scaled down.

Absolute figures cannot be compared, because the model is a few million parameters instead of billions. The
order of the rows can, and each table says what the paper concludes from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: Multiples of the automatic rate, for papers that tune each row. With labels of one or two tokens, few
#: examples and the bundled model, the best rate is far above the automatic one.
TUNED = ({"learning_rate_multiplier": 3.0}, {"learning_rate_multiplier": 10.0})


@dataclass(frozen=True)
class Row:
    """One row of a table, as the request that trains it."""

    #: As in the paper, or our own words for a row that the paper does not have.
    name: str
    #: The field `adapter` of the job.
    adapter: Mapping[str, Any]
    #: The paper's figure; None: it is not in the paper's text, or the row is ours.
    published: float | None = None


@dataclass(frozen=True)
class Table:
    """One table of a paper."""

    paper: str
    #: Number and place in the paper.
    table: str
    #: The paper's protocol, and what is different here.
    protocol: str
    scaled: str
    #: What the published figures are.
    metric: str
    #: What the paper concludes from the table.
    claim: str
    rows: tuple[Row, ...]
    #: Hyperparameters of the rate: every row is trained with each of them, and the best by validation counts.
    rates: tuple[Mapping[str, float], ...] = TUNED
    #: labels: a task with one label per text, judged by lm-eval; dictionary: definitions, judged by loss.
    task: Literal["labels", "dictionary"] = "labels"

    @property
    def has_labels(self) -> bool:
        return self.task == "labels"


def _core(
    name: str, rank: int, method: str, init: str, published: float | None = None, **options: Any
) -> Row:
    """Return a row of the r x r form. Options that the init has as well must agree."""
    needs_data = method in ("lora_sb", "lora_da")
    basis = {"method": method, "options": options, **({"calibration": "own"} if needs_data else {})}
    shared = {key: options[key] for key in ("noise",) if key in options and init == "sb_step"}
    return Row(name, {"rank": rank, "basis": basis, "init": {"method": init, "options": shared}}, published)


def _form(name: str, rank: int, form: str, published: float | None = None, **options: Any) -> Row:
    """Return a row of a LoRA form."""
    init = {"method": form, "options": options}
    return Row(name, {"form": "lora", "rank": rank, "init": init}, published)


_SMALL = (
    "a small chat model, five labels of support tickets (60 examples, 30 judged), 5 epochs in batches of 8"
)

LORA_XS = Table(
    paper="LoRA-XS",
    table="table 4",
    protocol="RoBERTa-large on SST-2, CoLA, MRPC and QNLI, rank 4, best median of five seeds over rates",
    scaled=f"{_SMALL}; mean of the seeds instead of a median of five",
    metric="MRPC accuracy",
    claim="the SVD of W beats random factors, which beat the SVD of a random matrix",
    rows=(
        _core("random", 4, "lora_xs", "noise", 85.78, vectors="random", with_sigma=False),
        _core("SVD of random", 4, "lora_xs", "noise", 84.31, vectors="svd_of_random"),
        _core("SVD of W", 4, "lora_xs", "noise", 87.50),
    ),
    rates=({"learning_rate_multiplier": 1.0}, *TUNED),
)
LORA_SB = Table(
    paper="LoRA-SB",
    table="table 4",
    protocol="Mistral-7B on 50,000 examples of MetaMathQA, judged by GSM8K and MATH; all rows orthonormal",
    scaled=f"{_SMALL}, rank 8; noise in units of η, because the paper's levels are not in its text",
    metric="none in the text",
    claim="the SVD of ΔW beats that of ΔW with noise, the more noise the worse, and that of a Kaiming matrix",
    rows=(
        _core("SVD of Kaiming", 8, "lora_xs", "zero", vectors="svd_of_random", with_sigma=False),
        *(
            _core(f"ΔW + noise {level:g} η", 8, "lora_sb", "sb_step", noise=level)
            for level in (10.0, 3.0, 1.0)
        ),
        _core("ΔW", 8, "lora_sb", "sb_step"),
    ),
)
LORA_DA = Table(
    paper="LoRA-DA",
    table="table 7, with two rows of table 2",
    protocol="LLaMA 2-7B on 100,000 examples of MetaMathQA, rank 8, 256 samples, one rate (2e-4), GSM8K",
    scaled=f"{_SMALL}, all of them as samples, one rate (1e-3) for all rows; the last two rows are ours",
    metric="GSM8K",
    claim="the whole method beats itself without bias, variance or Fisher, LoRA-One and LoRA",
    rates=({"learning_rate": 1e-3},),
    rows=(
        _form("LoRA", 8, "lora", 53.1),
        _form("LoRA-One", 8, "lora_one", 53.7),
        _form("without bias", 8, "lora_da_no_bias", 53.6),
        _form("without variance", 8, "lora_da_no_variance", 53.3),
        _form("without variance and Fisher", 8, "lora_da_no_fisher", 53.0),
        _form("LoRA-DA", 8, "lora_da", 55.0),
        _form("LoRA-DA, theorem 4.2's D", 8, "lora_da", output_factor="block"),
        _form("LoRA-DA, full output factor", 8, "lora_da", output_factor="full"),
    ),
)
LOLORA = Table(
    paper="LoLoRA",
    table="table 6 at r = 4, with a row of table 5",
    protocol="TinyLlama-1.1B on Alpaca, 7 epochs in batches of 6, a grid of rates for each row, five seeds",
    scaled="a small chat model, 60 definitions of a dictionary, 3 epochs in batches of 8, two rates",
    metric="perplexity",
    claim="HPCA and the autoencoder tie, beat HPCA without centring, which beats SoftHebb; LoRA is best",
    task="dictionary",
    rates=({"learning_rate": 3e-3}, {"learning_rate": 1e-2}),
    rows=(
        _form("HPCA (svd first)", 4, "lolora_svd", 2.546),
        _form("HPCA (uniform)", 4, "lolora", 2.545),
        _form("HPCA (EVA), a rate of A of 1e-4", 4, "lolora_eva", a_learning_rate=1e-4),
        _form("HPCA no mean", 4, "lolora_uncentred", 2.550),
        _form("AE (uniform)", 4, "lolora_ae", 2.547),
        _form("SoftHebb, as cited", 4, "lolora_softhebb_plain", 2.574),
        _form("SoftHebb, later code", 4, "lolora_softhebb"),
        _form("LoRA-FA (uniform)", 4, "lora_fa", 2.554),
        _form("full LoRA (uniform)", 4, "lora", 2.528),
    ),
)
LORAM = Table(
    paper="LoRAM",
    table="table 4, rank 16, GSM8K",
    protocol="LLaMA 2-7B on 100,000 examples of MetaMathQA, one small rate (2e-5) for all rows",
    scaled=f"{_SMALL}, one rate (3e-4) for all rows; tracking by product as in the paper",
    metric="GSM8K",
    claim="sines at a method's magnitude do as well as the method, except LoRA-GA; rsLoRA helps most",
    rates=({"learning_rate": 3e-4},),
    rows=(
        _form("LoRAM (sines)", 16, "loram", 40.3),
        _form("orthogonal", 16, "loram_orthogonal", 36.3),
        _form("Gaussian", 16, "loram_gaussian", 35.8),
        _form("MiLoRA", 16, "milora", 29.7),
        _form("tracking MiLoRA", 16, "loram_milora", 29.6),
        _form("PiSSA", 16, "pissa", 37.6),
        _form("tracking PiSSA", 16, "loram_pissa", 36.7),
        _form("CorDA", 16, "corda", 36.2),
        _form("tracking CorDA", 16, "loram_corda", 30.7),
        _form("LoRA-GA", 16, "lora_ga", 45.7),
        _form("tracking LoRA-GA", 16, "loram_lora_ga", 30.9),
        _form("LoRA-GA + rsLoRA", 16, "lora_ga_rslora", 51.5),
        _form("LoRAM + rsLoRA", 16, "loram_rslora", 52.1),
    ),
)
TABLES: Mapping[str, Table] = {
    "lora_xs": LORA_XS,
    "lora_sb": LORA_SB,
    "lora_da": LORA_DA,
    "lolora": LOLORA,
    "loram": LORAM,
}
