"""The model, run for one step: plan in, a token and log-probabilities for every chunk out.

Drives an unmodified transformers model through public doors only: a registered attention function, keyword
arguments that flow to it, and `logits_to_keep`, so that the head with its soft-capping is the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapter_core.errors import UnsupportedModel
from service.engine import attention
from service.engine.attention import AttentionProbe, AttentionStep, PagedAttention
from service.engine.batch import StepBatch, build_batch
from service.engine.kv_cache import KVShape, PagedKV
from service.engine.logprobs import finite_rows, token_logprobs
from service.engine.messages import TokenLogprobs
from service.engine.plan import StepPlan
from service.engine.resident_bases import ResidentBases
from service.engine.sampling import sample

_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class ModelFacts:
    """What a trial run of the model tells. kv_shapes: of every layer."""

    kv_shapes: tuple[KVShape, ...]
    vocab_size: int


@dataclass
class ChunkResult:
    """What the step brought one chunk. token_id: None if nothing was to be sampled. is_finite: False if its
    logits hold NaN or infinity, and then nothing else is meant."""

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    is_finite: bool = True


@torch.inference_mode()
def adopt(model: PreTrainedModel) -> ModelFacts:
    """Make `model` attend through us, and try one token. Raises `UnsupportedModel` if that fails."""
    config = model.config.get_text_config()
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - _SUPPORTED_LAYERS)
    if odd:
        raise _unsupported(model, f"has layers of type {', '.join(odd)}")
    model.set_attn_implementation(attention.NAME)
    probe = AttentionProbe()
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        logits = _forward(model, zero, zero, zero[0], probe)
    except TypeError as error:
        raise _unsupported(model, f"refuses our keyword arguments: {error}") from error
    layers = range(config.num_hidden_layers)
    if sorted(probe.shapes) != list(layers) or probe.num_calls != len(layers):
        raise _unsupported(model, f"attends {probe.num_calls} times in {len(layers)} layers where we see it")
    vocab_size = min(logits.shape[-1], model.get_input_embeddings().weight.shape[0])
    return ModelFacts(tuple(probe.shapes[layer] for layer in layers), vocab_size)


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"{type(model).__name__} cannot be served: it {reason}", param="base_model")


class ModelRunner:
    """Runs plans. The KV goes to `kv`, the adapters come from `bases`."""

    def __init__(self, model: PreTrainedModel, kv: PagedKV, bases: ResidentBases) -> None:
        self._model = model
        self._kv = kv
        self._bases = bases

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[ChunkResult]:
        """One result per chunk of the plan."""
        batch = build_batch(plan, self._kv.block_size, self._model.device)
        self._kv.clear(batch.fresh_blocks)
        for basis_id, table in self._bases.tables.items():
            table.stage(batch.slots.get(basis_id))
        step = PagedAttention(self._kv, batch.blocks, batch.offsets, batch.tiles)
        logits = _forward(self._model, batch.input_ids, batch.positions, batch.logit_rows, step)
        return _results(plan, batch, logits)


def _forward(
    model: PreTrainedModel, input_ids: Tensor, positions: Tensor, logit_rows: Tensor, step: AttentionStep
) -> Tensor:
    """Logits [rows, V] of the chosen rows of the flattened batch. input_ids, positions: int64 [1, T]."""
    output = model(
        input_ids=input_ids,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=logit_rows,
        paged_step=step,
    )
    logits: Tensor = output.logits[0]
    return logits


def _results(plan: StepPlan, batch: StepBatch, logits: Tensor) -> list[ChunkResult]:
    """logits: [samples + prompt rows, V], as `StepBatch.logit_rows` has them."""
    results = [ChunkResult() for _ in plan.chunks]
    sampling = [index for index, chunk in enumerate(plan.chunks) if chunk.samples]
    scoring = [index for index, chunk in enumerate(plan.chunks) for _ in chunk.prompt_positions]
    is_finite = finite_rows(logits)  # read only after sampling is under way: a read waits for the device
    if sampling:
        _sample(plan, logits[: len(sampling)].float(), sampling, results)
    if scoring:
        num_top = [plan.chunks[index].sequence.sampling.prompt_logprobs or 0 for index in scoring]
        reports = token_logprobs(logits[len(sampling) :], batch.prompt_targets, num_top)
        for index, report in zip(scoring, reports, strict=True):
            results[index].prompt_logprobs.append(report)
    for index, is_row_finite in zip((*sampling, *scoring), is_finite.tolist(), strict=True):
        results[index].is_finite &= is_row_finite
    return results


def _sample(plan: StepPlan, logits: Tensor, sampling: Rows[int], results: list[ChunkResult]) -> None:
    """Fill in the tokens of the chunks `sampling`, and their log-probabilities where they are wanted."""
    sequences = [plan.chunks[index].sequence for index in sampling]
    tokens = sample(logits, sequences)
    reported = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    if reported:
        num_top = [sequences[row].sampling.logprobs or 0 for row in reported]
        for row, report in zip(
            reported, token_logprobs(logits[reported], tokens[reported], num_top), strict=True
        ):
            results[sampling[row]].logprobs = report
    for index, token_id in zip(sampling, tokens.tolist(), strict=True):
        results[index].token_id = token_id
