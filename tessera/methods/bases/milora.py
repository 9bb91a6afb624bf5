"""MiLoRA (arXiv 2406.09044): the minor singular vectors of W, split evenly, so that learning disturbs little.

    A' = √Σ_{-r} V_{-r}ᵀ,   B' = U_{-r} √Σ_{-r}      (eqs 3 to 5)

As for PiSSA nothing is subtracted here. The authors' code also knows middle, top and random vectors.
"""

from __future__ import annotations

from tessera.methods.bases.lora_xs import repo_random
from tessera.methods.bases.pissa import split_evenly
from tessera.methods.building.method import COMMON_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.options import Option, Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """A' [r, d_in] and B' [d_out, r] from the last singular vectors of W."""
    if options["vectors"] == "random":
        return repo_random(data)
    return split_evenly(data, which=options["vectors"])


METHOD = Method(
    name="milora",
    description="the minor singular vectors of each weight, singular values split between both factors",
    paper="MiLoRA, arXiv 2406.09044, eqs 3-5",
    factorise=factorise,
    options={
        **COMMON_OPTIONS,
        "vectors": Option("bottom", "which singular vectors", choices=("bottom", "middle", "top", "random")),
    },
)
