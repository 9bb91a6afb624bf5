"""The choice of the attention implementation for a model and a device, with a self-check of the fast one.

    triton    `paged.TritonPagedAttention`, on CUDA
    torch     `reference.PagedAttention`, on any device: the reference implementation, which gathers K and V

The self-check compares the two on random contexts with the heads, windows and soft caps of the model. It also
compiles the kernels that serving needs.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from service.engine.attention.paged import PagedInputs, TritonPagedAttention, queries_per_tile
from service.engine.attention.query_tiles import query_tiles
from service.engine.attention.reference import AttentionOptions, AttentionTile, PagedAttention
from service.engine.kernels.paged_configs import MAX_HEAD_DIM
from service.engine.kv.cache import KVShape, PagedKV
from tessera.errors import UnsupportedModel

logger = logging.getLogger(__name__)

#: Largest difference from the reference implementation, as a share of a query's largest output. The reference
#: rounds scores to the KV's dtype and the kernels do not: for scores of size 1 this alone makes up to 0.010
#: in bfloat16 and 0.0016 in float16.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
#: Contexts of the self-check: single queries, including one that is split and a padded row, then a chunk.
_SINGLE_LENGTHS = (700, 65, 16, 1, 0)
_CHUNK_START, _CHUNK_LENGTH = 83, 150


class AttentionKind(StrEnum):
    TRITON = "triton"
    TORCH = "torch"


@dataclass(frozen=True)
class AttentionChoice:
    """The implementation that is used."""

    kind: AttentionKind
    #: Why it is not Triton; "" if it is.
    reason: str = ""


def choose_attention(
    kv: PagedKV, num_heads: int, options: Sequence[AttentionOptions], *, setting: str = "auto"
) -> AttentionChoice:
    """Return the fastest implementation that runs on the KV's device and passes its self-check.

    num_heads: query heads of every layer. options: those of each layer. setting: "auto", or the
    implementation to use. Raises `UnsupportedModel` if that is "triton" and Triton cannot be used.
    """
    device = kv.pages_of(0)[0].device
    if setting == AttentionKind.TORCH:
        return AttentionChoice(AttentionKind.TORCH, "the setting says so")
    reason = _obstacle(kv, device, is_forced=setting == AttentionKind.TRITON)
    if not reason:
        reason = _self_check(kv, num_heads, options)
        if reason:
            logger.error("the Triton attention kernels do not work here: %s", reason)
    if not reason:
        return AttentionChoice(AttentionKind.TRITON)
    if setting == AttentionKind.TRITON:
        raise UnsupportedModel(f"attention cannot run on Triton: {reason}", param="attention")
    return AttentionChoice(AttentionKind.TORCH, reason)


def _obstacle(kv: PagedKV, device: torch.device, *, is_forced: bool) -> str:
    """Return why Triton cannot be used at all; "" if it may be."""
    dtype = kv.pages_of(0)[0].dtype
    widest = max(max(shape.key_dim, shape.value_dim) for shape in kv.shapes)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and not is_forced:  # interpreted, for tests
        return f"the model is on {device.type}"
    if dtype not in _TOLERANCES:
        return f"the KV cache is in {dtype}"
    if widest > MAX_HEAD_DIM:
        return f"heads have {widest} dimensions, more than {MAX_HEAD_DIM}"
    return ""


def _self_check(kv: PagedKV, num_heads: int, options: Sequence[AttentionOptions]) -> str:
    """Compare the kernels with the reference implementation for each kind of layer of the model. Return the
    first error, or "" if there is none."""
    try:
        kinds = {(shape, own, own.sinks is None): own for shape, own in zip(kv.shapes, options, strict=True)}
        for (shape, _, _), layer_options in kinds.items():
            difference = _measure_difference(kv, shape, num_heads, layer_options)
            if not difference <= _TOLERANCES[kv.pages_of(0)[0].dtype]:
                return (
                    f"they differ from the reference implementation by {difference:.2g} of its size "
                    f"({layer_options})"
                )
    except Exception as error:  # whatever a compiler or a driver may raise
        return f"{type(error).__name__}: {error}"
    return ""


@torch.inference_mode()
def _measure_difference(kv: PagedKV, shape: KVShape, num_heads: int, options: AttentionOptions) -> float:
    """Return the difference between the kernels and the reference implementation in a mixed step, as
    `_TOLERANCES` measures it."""
    like = kv.pages_of(0)[0]
    lengths = [*_SINGLE_LENGTHS, _CHUNK_START + _CHUNK_LENGTH]
    width = -(-max(lengths) // kv.block_size)
    num_blocks = len(lengths) * width
    random_kv = PagedKV(
        [shape],
        num_blocks=num_blocks,
        block_size=kv.block_size,
        device=like.device,
        dtype=like.dtype,
    )
    generator = torch.Generator(like.device).manual_seed(0)
    for page in random_kv.pages_of(0):
        page[1:].normal_(generator=generator)
    tables = torch.arange(1, num_blocks + 1, device=like.device).view(len(lengths), width)
    num_tokens = len(_SINGLE_LENGTHS) + _CHUNK_LENGTH
    q = torch.empty(num_tokens, num_heads, shape.key_dim, device=like.device, dtype=like.dtype)
    q.normal_(generator=generator).mul_(shape.key_dim**-0.5 / options.scaling)  # scores of size 1
    expected = _reference_output(random_kv, q, tables, options)
    worst = 0.0
    for can_split in (False, True):
        inputs = _kernel_inputs(random_kv, tables, lengths, num_heads, can_split)
        out = TritonPagedAttention(random_kv, inputs).attend_cached(0, q, options)
        difference = (out.float() - expected.float()).abs().flatten(1).amax(1)
        size = expected.float().abs().flatten(1).amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        worst = max(worst, float((difference / size).nan_to_num(torch.inf).max()))
    return worst


def _kernel_inputs(
    kv: PagedKV, tables: Tensor, lengths: Sequence[int], num_heads: int, can_split: bool
) -> PagedInputs:
    num_single = len(_SINGLE_LENGTHS)
    per_tile = queries_per_tile(kv, num_heads)
    tiles = query_tiles(
        [num_single], [_CHUNK_START], [_CHUNK_LENGTH], first_sequence=num_single, queries_per_tile=per_tile
    )
    device = tables.device
    return PagedInputs(
        tables.to(torch.int32),
        torch.tensor(lengths, device=device),
        num_single,
        torch.from_numpy(tiles).to(device),
        per_tile,
        can_split,
    )


def _reference_output(kv: PagedKV, q: Tensor, tables: Tensor, options: AttentionOptions) -> Tensor:
    """Return the output of `PagedAttention`, with zeros for padded rows."""
    device = tables.device
    num_single = len(_SINGLE_LENGTHS)
    singles = torch.tensor([[max(0, length - 1)] for length in _SINGLE_LENGTHS], device=device)
    positions = torch.arange(_CHUNK_START, _CHUNK_START + _CHUNK_LENGTH, device=device)[None]
    nowhere = torch.empty(0, dtype=torch.int64, device=device)
    tiles = [
        AttentionTile(0, tables[:num_single], singles),
        AttentionTile(num_single, tables[num_single:], positions),
    ]
    out = PagedAttention(kv, nowhere, nowhere, tiles).attend_cached(0, q, options)
    out[:num_single][torch.tensor(_SINGLE_LENGTHS, device=device) == 0] = 0
    return out
