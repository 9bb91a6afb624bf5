"""Does lm-eval's `local-completions` score against Tessera as transformers does?

    python -m benchmarks.serving.lm_eval_sums --url http://127.0.0.1:8000 --model tiny [--folder models/tiny]

Needs a running service and `pip install 'lm-eval[api]==0.4.13'`, in a separate virtual environment because it
has many dependencies. Half of the items are chats with the model's own answer up to its end: lm-eval drops
the entry of one generated token, so a server that reports none for the end token would lose a real one.
tests/e2e/test_lm_eval.py checks the same with lm-eval's request and parsing rewritten.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import print_table
from service.generation.text import TextCodec, load_text_codec
from tessera.defaults import BUNDLED_MODEL

#: Both add up float32 numbers, in a different order.
TOLERANCE = 1e-3

NUM_ANSWERED = 5
#: Asked in turn until enough are answered within so many tokens.
QUESTIONS = (
    "What is 2 + 2?", "Name a color.", "Say yes.", "What is the capital of France?", "Who are you?",
    "one two three", "Is water wet? Answer yes or no.", "Define love.", "Thanks!", "hello",
)  # fmt: skip
MAX_ANSWER_TOKENS = 120
TEXTS = [
    ("The sky is", " blue"),
    ("One, two,", " three, four, five"),
    ("Question: is water wet?\nAnswer:", " yes"),
    ("def double(x):\n", "    return 2 * x\n"),
    ("naïve 🙂", " 日本語"),
]


@dataclass(frozen=True)
class Item:
    """What continues what, in token ids. total, is_greedy: what lm-eval is to report. ends: whether the most
    likely token behind it is an end token."""

    context: list[int]
    continuation: list[int]
    total: float
    is_greedy: bool
    ends: bool

    @property
    def token_ids(self) -> list[int]:
        return self.context + self.continuation


def make_items(model: Any, codec: TextCodec) -> list[Item]:
    """Ten items with their true figures. model: of transformers."""
    answered = (item for question in QUESTIONS if (item := _answered(model, codec, question)))
    items = list(itertools.islice(answered, NUM_ANSWERED))
    for context, continuation in TEXTS:
        ids = codec.chat.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        items.append(_scored(model, codec, codec.chat.text_ids(context), ids))
    return items


def _answered(model: Any, codec: TextCodec, question: str) -> Item | None:
    """A question with the model's own answer up to its end token, if that comes soon."""
    prompt = codec.chat.prompt_ids([{"role": "user", "content": question}])
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)[
        0
    ].tolist()
    return _scored(model, codec, prompt, ids[len(prompt) : -1]) if ids[-1] in codec.eos_token_ids else None


@torch.no_grad()
def _scored(model: Any, codec: TextCodec, context: list[int], continuation: list[int]) -> Item:
    logits = model(torch.tensor([context + continuation])).logits[0].float()
    rows, chosen = logits[len(context) - 1 : -1].log_softmax(-1), torch.tensor(continuation)
    total = float(rows.gather(1, chosen[:, None]).sum())
    is_greedy = bool((rows.argmax(-1) == chosen).all())
    return Item(context, continuation, total, is_greedy, int(logits[-1].argmax()) in codec.eos_token_ids)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--folder", type=Path, default=BUNDLED_MODEL)
    arguments = parser.parse_args()

    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32)
    items = make_items(model, load_text_codec(arguments.folder))
    client = LocalCompletionsAPI(
        base_url=f"{arguments.url}/v1/completions",
        model=arguments.model,
        tokenizer=str(arguments.folder),
        tokenizer_backend="huggingface",
        batch_size=4,
    )
    requests = [((str(i), ""), item.context, item.continuation) for i, item in enumerate(items)]
    answers = client._loglikelihood_tokens(requests)
    rows = [
        {
            "lm-eval": round(total, 4),
            "transformers": round(item.total, 4),
            "error": f"{abs(total - item.total):.1e}",
            "greedy": is_greedy,
            "ends at once": item.ends,
            "right": abs(total - item.total) < TOLERANCE and is_greedy == item.is_greedy,
        }
        for item, (total, is_greedy) in zip(items, answers, strict=True)
    ]
    print_table(rows)
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
