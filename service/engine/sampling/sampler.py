"""From logits to tokens, each row by its own request's parameters, and by a random generator of its own if
the request has a seed.

    token = argmax_v  p[v] / e[v],   e ~ Exp(1)       is a draw from p   (the exponential-noise trick)

A row's result depends on its logits, its parameters and its generator, never on the other rows of the batch;
requests without a seed share a generator, for which nobody can tell.
Order: rules (`logit_rules.py`), temperature, top_k, top_p, min_p.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from service.engine.kv.transfer import to_device
from service.engine.sampling.logit_rules import apply_rules, has_rules
from service.engine.scheduling.request import EngineRequest
from service.engine.wire.messages import SamplingParams

#: Below this a temperature is greedy: dividing by it would overflow float32.
MIN_TEMPERATURE = 1e-5


def make_generator(sampling: SamplingParams, device: torch.device) -> torch.Generator | None:
    """The random generator of one request; None if it draws nothing."""
    if is_greedy(sampling):
        return None
    if sampling.seed is None:
        return _unseeded_generator(device)
    return torch.Generator(device).manual_seed(sampling.seed & (2**63 - 1))


@functools.cache
def _unseeded_generator(device: torch.device) -> torch.Generator:
    """That of all requests without a seed: one call draws for all of them."""
    return torch.Generator(device).manual_seed(secrets.randbits(63))


def is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature < MIN_TEMPERATURE


def is_plain_greedy(request: EngineRequest) -> bool:
    """Whether its next token is the largest of the model's own logits."""
    return request.generator is None and not has_rules(request)


def sample(logits: Tensor, requests: Sequence[EngineRequest]) -> Tensor:
    """The next token of each request, int64 [N]. logits: float32 [N, V], left as they are."""
    logits = apply_rules(logits, requests)
    tokens = logits.argmax(-1)
    drawn = [index for index, request in enumerate(requests) if request.generator is not None]
    if drawn:
        rows = to_device(drawn, logits.device, torch.int64)
        tokens[rows] = _draw(logits[rows], [requests[index] for index in drawn])
    return tokens


def _draw(logits: Tensor, requests: Sequence[EngineRequest]) -> Tensor:
    """logits: [N, V] of requests that all have a generator; returns int64 [N]."""
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
        # of what top_k left, the fewest tokens that reach top_p of its mass; the first always stays
        mass_before = ranked.cumsum(-1) - ranked
        is_cut = (mass_before >= top_p * ranked.sum(-1, keepdim=True)) & (top_p < 1) & (rank > 0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ranked.masked_fill(is_cut, 0))
    if any(s.min_p > 0 for s in samplings):
        min_p = _column([s.min_p for s in samplings], probs)
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
    return probs


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return to_device(values, like.device, torch.float32)[:, None]
