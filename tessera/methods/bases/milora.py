"""MiLoRA (arXiv 2406.09044): the minor singular vectors of W, so that learning disturbs little.

    A' = √Σ_{-r} V_{-r}ᵀ,   B' = U_{-r} √Σ_{-r}                                          (eqs 3 to 5)

Needs no data. As for PiSSA, nothing is subtracted from W here. The authors' code also offers middle, top and
random vectors, and so does `vectors`.
"""

from __future__ import annotations

from tessera.methods.bases.lora_xs import repo_random
from tessera.methods.bases.pissa import split_evenly
from tessera.methods.building.method import COMMON_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Option, Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A' [r, d_in] and B' [d_out, r] from the chosen singular vectors of W, by default the last."""
    if options["vectors"] == "random":
        return repo_random(data)
    return split_evenly(data, which=options["vectors"])


METHOD = Method(
    name="milora",
    description="The minor singular vectors of each weight; A and B share the singular values",
    paper="MiLoRA, arXiv 2406.09044, eqs 3-5",
    factorise=factorise,
    options={
        **COMMON_OPTIONS,
        "vectors": Option(
            "bottom",
            "which singular vectors to use, or random factors",
            choices=("bottom", "middle", "top", "random"),
        ),
    },
)
