"""LoLoRA ("Locally fine-tuned low rank adapters"): A learned by online Hebbian PCA, without labels.

    for every 512 tokens:   A ← A - Adam(g),   g of a local rule such as -(1/T) uᵀ e    (algorithm 1)
    B = by `output_rule`, see `building/output_space.py`

`building/hebbian.py` has the rules. Needs text.

In the paper A learns from the inputs during fine-tuning while B is trained. Users cannot share an A that
moves, so here A learns from a stream of text with the adapter at zero (the paper's own control, in which it
converges to EVA's recall error), and is then frozen and published as a basis. `hebbian.online_delta` is the
paper's rule, for training A and B together.

By default A is initialized with the principal components of the first batch, as the paper does for GLUE but
not for MetaMath. The reason is that one pass over the text makes few steps. With 512 tokens a step, the
distance to the true principal subspace (at most 2.0 at rank 4 of 64) after 30 / 100 / 300 / 1000 steps is
1.65 / 1.17 / 0.18 / 0.05 with Adam at 1.5e-3 from random rows, and 0.31 / 0.27 / 0.18 / 0.05 with 1e-4 from
those components.
"""

from __future__ import annotations

from functools import partial

import torch

from tessera.methods.building.activations import InputRule
from tessera.methods.building.collected import Needs
from tessera.methods.building.decomposition import check_numerical_rank, module_seed, orthonormal_columns
from tessera.methods.building.hebbian import RULES, HebbianConfig, HebbianRule
from tessera.methods.building.method import DATA_OPTIONS, Method, ModuleData, ModuleFactors
from tessera.methods.building.output_space import OUTPUT_RULE_OPTION, needs_for, output_space
from tessera.methods.options import Option, Options

#: Adam's learning rates for A in the paper: from random rows, and from the first batch (tables 6 and 7).
LR, LR_AFTER_SVD = 1.5e-3, 1e-4


def factorise(data: ModuleData, options: Options) -> ModuleFactors:
    """Return A [r, d_in], the learned rows made orthonormal, and B [d_out, r] chosen by `output_rule`."""
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
    """Return the required statistics: the local rule on the inputs, and those of the rule for B."""
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
    description="Principal components of each module's inputs, learned online by a Hebbian rule",
    paper="LoLoRA (Locally fine-tuned low rank adapters), algorithm 1",
    factorise=factorise,
    needs_calibration="text",
    options={
        **DATA_OPTIONS,
        "rule": Option("hpca", "the local learning rule", choices=RULES),
        "svd_first": Option(True, "initialize A with the principal components of the first batch"),
        "lr": Option(
            None, "Adam's learning rate for A; default 1e-4 with svd_first, else 1.5e-3", float, minimum=1e-12
        ),
        "momentum": Option(0.98, "momentum of the running mean of the inputs", minimum=0.0, maximum=1.0),
        "centred": Option(True, "subtract the running mean from the inputs"),
        "tokens_per_step": Option(512, "tokens per update of A", minimum=1),
        "output_rule": OUTPUT_RULE_OPTION,
    },
    needs=needs,
)
