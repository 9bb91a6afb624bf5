"""LoLoRA ("Locally fine-tuned low rank adapters"): A by online Hebbian PCA, as a label-free basis-building
job.

The paper lets A learn from the inputs during fine-tuning while B is trained. An A that moves cannot be
shared, so here it learns on a stream of text with the adapter at zero (the paper's own control, where it
converges to EVA's recall error), is frozen and published as a basis. B comes from a rule
(`output_space.py`); the paper's B is trained. The rule for training A and B together is
`hebbian.online_delta`.

One pass over the text makes few steps: with 512 tokens a step the distance to the true principal subspace
(at most 2.0 at rank 4 of 64) is 1.65 / 1.17 / 0.18 / 0.05 after 30 / 100 / 300 / 1000 steps of Adam at
1.5e-3, and 0.31 / 0.27 / 0.18 / 0.05 from the first batch's principal components at 1e-4. So that start is
the default here; the paper uses it for GLUE, not for MetaMath.
"""

from __future__ import annotations

from functools import partial

import torch

from tessera.methods.building.activations import InputRule
from tessera.methods.building.collected import Needs
from tessera.methods.building.decomposition import check_numerical_rank, module_seed, orthonormal_columns
from tessera.methods.building.hebbian import HebbianConfig, HebbianRule
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.building.output_space import OUTPUT_RULE_OPTION, needs_for, output_space
from tessera.methods.options import Option, Options

#: Of Adam on A: the paper's, without and with the start from the first batch (tables 6 and 7).
LR, LR_AFTER_SVD = 1.5e-3, 1e-4


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """A [r, d_in] with the rows that the rule learned, made orthonormal; B [d_out, r] by `output_rule`."""
    rule = data.statistics.inputs
    assert isinstance(rule, HebbianRule)
    check_numerical_rank(torch.linalg.svdvals(rule.A), data.rank, f"the learned A of {data.shape.name}")
    identity = torch.eye(data.rank).to(rule.A)
    deviation = float(torch.linalg.matrix_norm(rule.A @ rule.A.mT - identity))
    A = orthonormal_columns(rule.A.mT).mT
    B = output_space(options["output_rule"], A, data)
    return ModuleFactors(A, B, notes={"num_steps": float(rule.num_steps), "orthonormality_error": deviation})


def make_rule(rank: int, config: HebbianConfig, seed: int, name: str, width: int) -> InputRule:
    generator = torch.Generator().manual_seed(module_seed(seed, "lolora", name, rank))
    return HebbianRule(width, rank, config, generator=generator)


def needs(rank: int, options: Options) -> Needs:
    default_lr = LR_AFTER_SVD if options["svd_first"] else LR
    config = HebbianConfig(
        rule=options["rule"],
        lr=options["lr"] or default_lr,
        momentum=options["momentum"],
        is_centred=options["centred"],
        svd_first=options["svd_first"],
        tokens_per_step=options["tokens_per_step"],
    )
    return needs_for(options["output_rule"], inputs=partial(make_rule, rank, config, options["seed"]))


METHOD = Method(
    name="lolora",
    description="online Hebbian principal components of each module's inputs, with a chosen output space",
    paper="LoLoRA (Locally fine-tuned low rank adapters), algorithm 1",
    factorise=factorise,
    needs_calibration="text",
    options={
        **DATA_OPTIONS,
        "rule": Option("hpca", "the local rule", choices=("hpca", "ae", "softhebb")),
        "svd_first": Option(True, "start from the principal components of the first batch"),
        "lr": Option(None, "of Adam on A; unset 1.5e-3, or 1e-4 with svd_first", float, minimum=1e-12),
        "momentum": Option(0.98, "of the running mean", minimum=0.0, maximum=1.0),
        "centred": Option(True, "subtract the running mean"),
        "tokens_per_step": Option(512, "tokens of one update", minimum=1),
        "output_rule": OUTPUT_RULE_OPTION,
    },
    needs=needs,
)
