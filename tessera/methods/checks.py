"""Checks of methods for ranks and for options that cannot work together. Needs no torch."""

from __future__ import annotations

from tessera.errors import InvalidInput
from tessera.methods.options import Options

#: The factor c of the rank in LoRAM's log(c r), by the value of `magnitude`.
LOG_FACTORS = {"log_half": 0.5, "log": 1.0, "log_double": 2.0}


def check_lora_da(rank: int, options: Options) -> None:
    """Raise `InvalidInput` for options that leave no bias term where one is needed."""
    if not (options["use_variance"] or options["use_bias"]):
        raise InvalidInput(
            "use_variance and use_bias are both off: nothing guides the basis", param="use_bias"
        )
    if options["form"] == "two_sided" and not options["use_bias"]:
        raise InvalidInput("the two-sided form needs the bias term", param="use_bias")
    if options["output_factor"] == "diagonal":
        return
    if not options["use_fisher"]:
        raise InvalidInput(
            "output_factor is a part of the Fisher information, but use_fisher is off", param="output_factor"
        )
    if options["form"] == "two_sided":
        raise InvalidInput(
            "the two-sided form always uses the full output factor; leave output_factor out",
            param="output_factor",
        )


def check_lora_ga(rank: int, options: Options) -> None:
    """Raise `InvalidInput` for the direction that does not train (`bases/lora_ga.py`)."""
    if options["direction"] == "ArB2r":
        raise InvalidInput(
            "direction ArB2r leaves R without a gradient, U[r:2r]ᵀ g V[:r] = 0; use ArBr",
            param="direction",
        )


def stores_loram(options: Options) -> bool:
    """Return whether LoRAM's factors are stored, and not only its manifest."""
    return bool(options.get("store_factors"))


def loram_needs_data(options: Options) -> bool:
    """Return whether LoRAM tracks a method whose magnitude depends on data. options: with all defaults."""
    tracks = options["rule"] != "none" and options["magnitude"] == "tracking"
    return bool(tracks and options["reference"] == "corda")


def check_loram(rank: int, options: Options) -> None:
    """Raise `InvalidInput` for a rank at which Q is 0, so that nothing would train, or for options that
    contradict each other."""
    if options["tracking"] == "factor" and options["magnitude"] != "tracking":
        raise InvalidInput(
            "tracking says how another method's magnitude is followed, so it needs magnitude=tracking",
            param="tracking",
        )
    if options["rule"] == "none" or options["magnitude"] == "tracking":
        return
    if LOG_FACTORS[options["magnitude"]] * rank <= 1:
        least = 3 if options["magnitude"] == "log_half" else 2
        raise InvalidInput(
            f"LoRAM's magnitude {options['magnitude']} is 0 at rank {rank}, so nothing would train: "
            f"use a rank of at least {least}",
            param="rank",
        )


def fixed_eta(options: Options) -> float | None:
    """Return the η that the options determine, or None for a line search.

    Raises `InvalidInput` if an option is missing.
    """
    mode = options["eta_init"]
    if mode == "line_search":
        return None
    needed = {
        "value": ["eta"],
        "lr": ["learning_rate"],
        "first_warmup_step": ["learning_rate", "total_steps"],
    }[mode]
    for name in needed:
        if options[name] is None:
            raise InvalidInput(f"eta_init={mode} needs {name}", param=name)
    if mode == "value":
        return float(options["eta"])
    if mode == "lr":
        return float(options["learning_rate"])
    return float(options["learning_rate"] / max(1.0, options["warmup_ratio"] * options["total_steps"]))
