"""Whether the fused path says what the model says: a few tokens through both, before the first request.

Two short sequences, one with a random adapter and one without, prefilled in pieces and continued by a
token. The tolerance is for rounding: a wrong norm, rotation or factor is off by far more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from service.engine.scheduling.plan import Chunk, StepPlan
from service.engine.scheduling.request import EngineRequest
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.formats.adapter_ref import AdapterRef

#: Root mean square of the difference over that of the logits. Measured on four families of three layers:
#: float32 5e-7, float16 0.2 %, bfloat16 1.5 %, for in half precision the two paths round at different places;
#: it grows with the root of the depth. What is wrong is off by the size of the logits.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: Of the random R: enough for an adapter that is left out, or another's, to show.
_R_SCALE = 0.5
_LENGTHS = (6, 4)
#: Positions that the trial needs, however short the sequences are that the engine serves.
NUM_POSITIONS = max(_LENGTHS)


def num_trial_blocks(block_size: int) -> int:
    """KV blocks that the trial's sequences take."""
    return sum(-(-length // block_size) for length in _LENGTHS)


def trial_plans(
    vocab_size: int, block_size: int, basis_id: str, *, slot: int, max_tokens: int
) -> list[StepPlan]:
    """Steps that cover prefill, continued prefill and decode, in the blocks from 1 on. basis_id: of the
    adapter in `slot` for the first sequence, or "". max_tokens: of one step; too few for a mix make steps
    of one."""
    generator = torch.Generator().manual_seed(0)
    sequences, first = [], 1
    for length, name in zip(_LENGTHS, (basis_id, ""), strict=True):
        token_ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        adapter = AdapterRef("", "trial", 1, name) if name else None
        sequence = EngineRequest(GenerationRequest("", "", token_ids, SamplingParams(), adapter), 0, b"")
        sequence.slot = slot if name else 0
        last = first + -(-length // block_size)
        sequence.blocks, first = list(range(first, last)), last
        sequences.append(sequence)
    long, short = sequences
    if max_tokens < sum(_LENGTHS):
        return [StepPlan([Chunk(s, at, 1)]) for s in sequences for at in range(s.num_tokens)]
    return [
        StepPlan([Chunk(short, 0, 1), Chunk(long, 0, 5)]),
        StepPlan([Chunk(long, 5, 1), Chunk(short, 1, 3)]),
    ]


def trial_core(shape: tuple[int, ...]) -> Tensor:
    """R of the trial's adapter, [M, r, r]."""
    return _R_SCALE * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def disagreement(logits: Tensor, expected: Tensor) -> float:
    """Relative difference; infinite if one of them is not finite."""
    expected = expected.float()
    error = (logits.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    return float(error) if torch.isfinite(error) else float("inf")
