"""Sample tokens from logits, each row by the parameters of its own request.

    token = argmax_v  p[v] / e[v],   e ~ Exp(1)       is a draw from p   (the exponential-noise trick)

The result of a row depends on its logits, its parameters and its generator, never on the other rows of the
batch. A request with a seed has a random generator of its own; all others share one, which makes no
observable difference.

Order: rules, temperature, top_k, top_p, min_p. The rules change the model's logits, each in float32 and on
its own row only, in this order:

    repetition   z[v] = z[v] / p if z[v] > 0 else z[v] * p   for v in prompt or output (arXiv 1909.05858)
    frequency    z[v] -= f * (number of times v occurs in the output)
    presence     z[v] -= p * (v occurs in the output)
    bias         z[v] += bias[v]
    min_tokens   z[v] = -inf for the stop tokens, while the output is shorter
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from service.engine.kv.memory import to_device
from service.engine.scheduling.request import EngineRequest
from service.engine.wire.messages import SamplingParams

#: Temperatures below this are greedy, because dividing by them would overflow float32.
MIN_TEMPERATURE = 1e-5


def make_generator(sampling: SamplingParams, device: torch.device) -> torch.Generator | None:
    """Return the random generator of one request; None if it draws nothing."""
    if is_greedy(sampling):
        return None
    if sampling.seed is None:
        return _unseeded_generator(device)
    return torch.Generator(device).manual_seed(sampling.seed & (2**63 - 1))


@functools.cache
def _unseeded_generator(device: torch.device) -> torch.Generator:
    """Return the generator of all requests without a seed: one call draws for all of them."""
    return torch.Generator(device).manual_seed(secrets.randbits(63))


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < MIN_TEMPERATURE


def is_plain_greedy(request: EngineRequest) -> bool:
    """Whether a request's next token is the largest of the model's own logits."""
    return request.generator is None and not has_active_rules(request)


def sample(logits: Tensor, requests: Sequence[EngineRequest]) -> Tensor:
    """Return the next token of each request, int64 [N]. logits: float32 [N, V], not changed."""
    logits = apply_rules(logits, requests)
    tokens = logits.argmax(-1)
    drawn = [index for index, request in enumerate(requests) if request.generator is not None]
    if drawn:
        rows = to_device(drawn, logits.device, torch.int64)
        tokens[rows] = _draw(logits[rows], [requests[index] for index in drawn])
    return tokens


def apply_rules(logits: Tensor, requests: Sequence[EngineRequest]) -> Tensor:
    """Return the logits from which tokens are chosen. logits: float32 [N, V]; returns a copy if a row has
    rules."""
    ruled = [index for index, r in enumerate(requests) if r.may_have_rules and has_active_rules(r)]
    if not ruled:
        return logits
    logits = logits.clone()
    for index in ruled:
        _apply_to_row(logits[index], requests[index])
    return logits


def has_active_rules(request: EngineRequest) -> bool:
    """Whether a request's logits are changed at this step, for which its last token may be needed."""
    return request.has_rules or _must_continue(request)


def _must_continue(request: EngineRequest) -> bool:
    sampling = request.sampling
    return (
        sampling.min_tokens > 0 and request.num_output < sampling.min_tokens and bool(sampling.stop_token_ids)
    )


def _apply_to_row(row: Tensor, request: EngineRequest) -> None:
    """row: [V], changed in place."""
    sampling, counts = request.sampling, request.output_counts
    if sampling.repetition_penalty != 1:
        seen = _ids(row, request.prompt_set.union(counts))
        values = row[seen]
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if counts and (sampling.frequency_penalty != 0 or sampling.presence_penalty != 0):
        times = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
        row[_ids(row, counts)] -= sampling.frequency_penalty * times + sampling.presence_penalty
    if sampling.logit_bias:
        bias = torch.tensor(list(sampling.logit_bias.values()), device=row.device, dtype=row.dtype)
        row[_ids(row, sampling.logit_bias)] += bias
    if _must_continue(request):
        row[_ids(row, [token for token in sampling.stop_token_ids if token < len(row)])] = float("-inf")


def _ids(
    row: Tensor, token_ids: Sequence[int] | frozenset[int] | dict[int, float] | dict[int, int]
) -> Tensor:
    return torch.tensor(list(token_ids), device=row.device, dtype=torch.int64)


def finite_rows(logits: Tensor) -> Tensor:
    """Return which rows hold only finite numbers, bool [N]. logits: [N, V]."""
    low, high = torch.aminmax(logits, dim=-1)  # both are NaN if any number is; makes no mask of [N, V]
    return torch.isfinite(low) & torch.isfinite(high)


def _draw(logits: Tensor, requests: Sequence[EngineRequest]) -> Tensor:
    """Draw the next tokens, int64 [N]. logits: [N, V] of requests that all have a generator."""
    temperature = _column([s.sampling.temperature for s in requests], logits)
    probs = _truncate((logits / temperature).softmax(-1), [s.sampling for s in requests])
    noise = torch.empty_like(probs)
    unseeded = next((s.generator for s in requests if s.sampling.seed is None), None)
    if unseeded is not None:
        noise.exponential_(generator=unseeded)
    for row, request in zip(noise, requests, strict=True):
        if request.generator is not unseeded:
            row.exponential_(generator=request.generator)
    # An exponential may come out as 0, and 0 / 0 would choose a token of probability 0.
    return (probs / noise.clamp_min_(torch.finfo(noise.dtype).tiny)).argmax(-1)


def _truncate(probs: Tensor, samplings: Sequence[SamplingParams]) -> Tensor:
    """Probabilities [N, V] with the tokens that top_k, top_p and min_p exclude set to 0, not renormalised."""
    vocab_size = probs.shape[-1]
    if any(s.top_k > 0 or s.top_p < 1 for s in samplings):
        top_k = _column([min(s.top_k, vocab_size) if s.top_k > 0 else vocab_size for s in samplings], probs)
        top_p = _column([s.top_p for s in samplings], probs)
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(vocab_size, device=probs.device)
        ranked = ranked.masked_fill(rank >= top_k, 0)
        # of what top_k left, keep the fewest tokens that reach top_p of its mass, and always the first
        mass_before = ranked.cumsum(-1) - ranked
        is_cut = (mass_before >= top_p * ranked.sum(-1, keepdim=True)) & (top_p < 1) & (rank > 0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ranked.masked_fill(is_cut, 0))
    if any(s.min_p > 0 for s in samplings):
        min_p = _column([s.min_p for s in samplings], probs)
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    return probs


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return to_device(values, like.device, torch.float32)[:, None]
