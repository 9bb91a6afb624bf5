"""EVA (arXiv 2410.07170): A from the principal components of a module's inputs.

    A = top r right singular vectors of the centred inputs [T, d_in]                    (algorithm 1)
    B = by `output_rule`, see `building/output_space.py`

Needs text. Three things differ from the paper:

* The authors and PEFT run an incremental, randomised PCA until it stops moving. Here the covariance is summed
  exactly and decomposed once, which is what theirs converges to.
* Their PCA reads only the tokens to learn. Text without labels has none, so `tokens="all"` is the default and
  `tokens="label"` is theirs.
* EVA initializes B with 0 and trains it; a frozen B needs a rule.

EVA also redistributes ranks over layers by explained variance (ρ). That is not offered, because a basis has
one rank, so that an adapter is one tensor [M, r, r].
"""

from __future__ import annotations

from tessera.methods.building.activations import InputRule, SecondMoment
from tessera.methods.building.collected import Needs, Tokens
from tessera.methods.building.decomposition import smallest_eigenvectors
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.building.output_space import OUTPUT_RULE_OPTION, needs_for, output_space
from tessera.methods.options import Option, Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A [r, d_in] and B [d_out, r], both orthonormal."""
    rule = data.statistics.inputs
    assert isinstance(rule, SecondMoment)
    A = smallest_eigenvectors(-rule.covariance, data.rank, generator=data.generator()).mT
    return ModuleFactors(A, output_space(options["output_rule"], A, data))


def make_rule(name: str, width: int) -> InputRule:
    return SecondMoment(width)


def needs(rank: int, options: Options) -> Needs:
    tokens: Tokens = "label" if options["tokens"] == "label" else "all"
    return needs_for(options["output_rule"], inputs=make_rule, input_tokens=tokens)


METHOD = Method(
    name="eva",
    description="The principal components of each module's inputs; output_rule chooses B",
    paper="EVA, arXiv 2410.07170, algorithm 1",
    factorise=factorise,
    needs_calibration="text",
    options={
        **DATA_OPTIONS,
        "tokens": Option(
            "all",
            "which tokens' inputs are used; the authors use those to learn (label)",
            choices=("label", "all"),
        ),
        "output_rule": OUTPUT_RULE_OPTION,
    },
    needs=needs,
)
