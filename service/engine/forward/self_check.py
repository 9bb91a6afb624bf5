"""The comparison of the fused path with the model itself: a few tokens through both, before the first
request.

Two short requests, one with a random adapter and one without, are prefilled in pieces and continued by a
token. The tolerance covers rounding; a wrong norm, rotation or factor differs by far more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from service.engine.scheduling.plan import Chunk, StepPlan
from service.engine.scheduling.request import EngineRequest
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.formats.adapter_ref import AdapterRef

#: Root mean square of the difference, divided by that of the logits. Measured on four families of three
#: layers: 5e-7 in float32, 0.2 % in float16 and 1.5 % in bfloat16, because in half precision the two paths
#: round at different places; it grows with the square root of the depth. An error makes a difference of the
#: size of the logits.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: The scale of the random R: large enough to show an adapter that is left out or confused with another.
_R_SCALE = 0.5
_LENGTHS = (6, 4)
#: Positions that the self-check needs, even if the engine serves shorter requests only.
NUM_POSITIONS = max(_LENGTHS)


def num_blocks(block_size: int) -> int:
    """Return the number of KV blocks that the requests of the self-check take."""
    return sum(-(-length // block_size) for length in _LENGTHS)


def step_plans(
    vocab_size: int, block_size: int, basis_id: str, *, slot: int, max_tokens: int
) -> list[StepPlan]:
    """Return steps that cover prefill, continued prefill and decode, in the blocks from 1 on.

    basis_id: basis of the adapter in `slot` for the first request, or "". max_tokens: limit of one step; if
    it is too low for mixed steps, each step has one token.
    """
    generator = torch.Generator().manual_seed(0)
    requests, first = [], 1
    for length, name in zip(_LENGTHS, (basis_id, ""), strict=True):
        token_ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        adapter = AdapterRef("", "self-check", 1, name) if name else None
        request = EngineRequest(GenerationRequest("", "", token_ids, SamplingParams(), adapter), 0, b"")
        request.slot = slot if name else 0
        last = first + -(-length // block_size)
        request.blocks, first = list(range(first, last)), last
        requests.append(request)
    long, short = requests
    if max_tokens < sum(_LENGTHS):
        return [StepPlan([Chunk(r, at, 1)]) for r in requests for at in range(r.num_tokens)]
    return [
        StepPlan([Chunk(short, 0, 1), Chunk(long, 0, 5)]),
        StepPlan([Chunk(long, 5, 1), Chunk(short, 1, 3)]),
    ]


def random_core(shape: tuple[int, ...]) -> Tensor:
    """Return a random R for the adapter of the self-check, [M, r, r]."""
    return _R_SCALE * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def disagreement(logits: Tensor, expected: Tensor) -> float:
    """Return the relative difference; infinite if one of the two is not finite."""
    expected = expected.float()
    error = (logits.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    return float(error) if torch.isfinite(error) else float("inf")
