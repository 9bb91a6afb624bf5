"""An evaluation by log-likelihood, as lm-eval asks for it, gives the figures of transformers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.serving.lm_eval_sums import NUM_ANSWERED, TOLERANCE, Item, make_items
from service.generation.text import load_text_codec
from tessera.defaults import BUNDLED_MODEL
from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(300)]


def test_sums_are_those_of_transformers_also_where_the_model_ends_at_once(stack: Stack) -> None:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    items = make_items(model, load_text_codec(BUNDLED_MODEL))
    assert sum(item.ends for item in items) >= NUM_ANSWERED

    answer = httpx.post(f"{stack.url}/v1/completions", json=request_body(items), timeout=60).json()

    for choice, item in zip(answer["choices"], items, strict=True):
        assert len(choice["logprobs"]["tokens"]) == len(item.token_ids) + 1
        total, is_greedy = score_of(choice, item)
        assert total == pytest.approx(item.total, abs=TOLERANCE)
        assert is_greedy == item.is_greedy
    assert answer["usage"]["completion_tokens"] == len(items)


def request_body(items: list[Item]) -> dict[str, Any]:
    """What lm-eval 0.4.13 sends for a batch of items."""
    return {
        "model": "tiny",
        "prompt": [item.token_ids for item in items],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def score_of(choice: dict[str, Any], item: Item) -> tuple[float, bool]:
    """How it reads the answer: what is behind the context is the continuation's, except for the last entry,
    which must be that of the one generated token."""
    columns = choice["logprobs"]
    logprobs = columns["token_logprobs"][len(item.context) : -1]
    tops = columns["top_logprobs"][len(item.context) : -1]
    is_greedy = all(value == max(top.values()) for value, top in zip(logprobs, tops, strict=True))
    return sum(logprobs), is_greedy
