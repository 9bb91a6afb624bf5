"""EVA (arXiv 2410.07170): A from the principal components of a module's inputs.

    A = top-r right singular vectors of the centred inputs [T, d_in]      (algorithm 1)

The authors and PEFT run an incremental, randomised PCA until it stops moving; here the covariance is summed
exactly and decomposed once, which is what theirs converges to. Theirs looks at the tokens to learn only
(`tokens="label"`), which text without labels does not have. EVA starts B at 0 and trains it; with B frozen
it needs a rule (`output_space.py`).

The redistribution of ranks over layers by explained variance (ρ) is not offered: a basis has one rank, so
that an adapter is one tensor [M, r, r].
"""

from __future__ import annotations

from tessera.methods.building.activations import InputRule, SecondMoment
from tessera.methods.building.collected import Needs, Tokens
from tessera.methods.building.decomposition import smallest_eigenvectors
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.building.output_space import OUTPUT_RULE_OPTION, needs_for, output_space
from tessera.methods.options import Option, Options


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """A [r, d_in], B [d_out, r], both orthonormal."""
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
    description="the principal components of each module's inputs, with a chosen output space",
    paper="EVA, arXiv 2410.07170, algorithm 1",
    factorise=factorise,
    needs_calibration="text",
    options={
        **DATA_OPTIONS,
        "tokens": Option("all", "whose inputs are looked at; label as the authors", choices=("label", "all")),
        "output_rule": OUTPUT_RULE_OPTION,
    },
    needs=needs,
)
