"""What a request must be before it may enter: one that would break a step must never be in one.

The HTTP schemas have checked it once already; they do not know the vocabulary or the memory, and a bug there
must cost a request, not a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.errors import InvalidInput


@dataclass(frozen=True)
class RequestLimits:
    """vocab_size: token ids are below it. max_model_len: prompt and output of one sequence in tokens."""

    vocab_size: int
    max_model_len: int

    def check(self, request: GenerationRequest) -> None:
        """Raises `InvalidInput`."""
        num_prompt, max_tokens = len(request.token_ids), request.sampling.max_tokens
        if num_prompt == 0:
            raise InvalidInput("the prompt is empty: it needs at least one token", param="prompt")
        self._check_token_ids(request.token_ids, "prompt")
        self._check_token_ids(list(request.sampling.logit_bias), "logit_bias")
        _check_sampling(request.sampling)
        if num_prompt + max_tokens > self.max_model_len:
            raise InvalidInput(
                f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together "
                f"{num_prompt + max_tokens}; this model serves up to {self.max_model_len}",
                param="prompt" if num_prompt >= self.max_model_len else "max_tokens",
                code="context_length_exceeded",
            )
        if request.deadline_s is not None and not request.deadline_s > 0:
            raise InvalidInput(f"deadline_s must be above 0, got {request.deadline_s}", param="deadline_s")

    def _check_token_ids(self, token_ids: list[int], param: str) -> None:
        for token_id in token_ids:
            if not isinstance(token_id, int) or not 0 <= token_id < self.vocab_size:
                raise InvalidInput(
                    f"token id {token_id!r} is not a whole number from 0 to {self.vocab_size - 1}",
                    param=param,
                )


def _check_sampling(sampling: SamplingParams) -> None:
    ranges: dict[str, tuple[float, float]] = {
        "max_tokens": (0, math.inf),
        "min_tokens": (0, math.inf),
        "temperature": (0, 1e6),
        "top_p": (0, 1),
        "top_k": (0, math.inf),
        "min_p": (0, 1),
        "presence_penalty": (-100, 100),
        "frequency_penalty": (-100, 100),
        "repetition_penalty": (1e-3, 1e3),
        "logprobs": (0, math.inf),
        "prompt_logprobs": (0, math.inf),
    }
    for name, (low, high) in ranges.items():
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:  # false for NaN too
            raise InvalidInput(f"{name} must be between {low:g} and {high:g}, got {value}", param=name)
    if not all(math.isfinite(bias) for bias in sampling.logit_bias.values()):
        raise InvalidInput("logit_bias must hold finite numbers", param="logit_bias")
