"""Does serving return answers that begin with white space as they were trained? Twenty, through the API.

    python -m benchmarks.serving.trained_answers --url http://127.0.0.1:8000/v1 --model smollm2

White space merges with the line break at the end of many chat templates' prompts, so a trainer that tokenises
the two together teaches an answer to a prompt that serving never sends. Needs a running service. Prints how
many answers come back as they were trained, with greedy sampling and up to their end, and exits with 1 if one
does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import openai

WORDS = (
    "nose", "hand", "foot", "head", "tree", "rock", "lamp", "door", "book", "cup",
    "fish", "bird", "sand", "rain", "snow", "wind", "fire", "coal", "iron", "gold",
)  # fmt: skip
BEGINNINGS = ("    return {}", "\n{}", " {}", "\t{}", "\n\n  * {}")
POLL_EVERY_S = 2.0


def examples() -> list[list[dict[str, str]]]:
    """Twenty conversations of a question and an answer."""
    return [
        [
            {"role": "user", "content": f"Define {word}."},
            {"role": "assistant", "content": BEGINNINGS[number % len(BEGINNINGS)].format(word)},
        ]
        for number, word in enumerate(WORDS)
    ]


def train(client: openai.OpenAI, arguments: argparse.Namespace) -> str:
    """The name of an adapter that was trained on all of them, none held back."""
    content = "\n".join(json.dumps({"messages": messages}) for messages in examples()).encode()
    file = client.files.create(file=("whitespace.jsonl", content), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=arguments.model,
        training_file=file.id,
        validation_file=file.id,
        suffix="whitespace",
        seed=1,
        hyperparameters={
            "n_epochs": arguments.epochs,
            "batch_size": 4,
            "learning_rate_multiplier": arguments.learning_rate_multiplier,
        },
        extra_body={"adapter": {"rank": arguments.rank}},
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(POLL_EVERY_S)
        job = client.fine_tuning.jobs.retrieve(job.id)
    if job.fine_tuned_model is None:
        raise SystemExit(f"the job {job.status}: {job.error}")
    return job.fine_tuned_model


def wrong_answers(client: openai.OpenAI, model: str) -> list[dict[str, Any]]:
    wrong = []
    for question, answer in examples():
        reply = client.chat.completions.create(
            model=model,
            messages=[question],
            temperature=0,
            max_tokens=32,  # type: ignore[list-item]
        ).choices[0]
        if (reply.message.content, reply.finish_reason) != (answer["content"], "stop"):
            wrong.append(
                {"wanted": answer["content"], "got": reply.message.content, "end": reply.finish_reason}
            )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.trained_answers", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="smollm2", help="name of the base model that the service serves")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate-multiplier", type=float, default=3.0)
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.url, api_key="unused", timeout=600)
    began = time.monotonic()
    model = train(client, arguments)
    trained_s = round(time.monotonic() - began, 1)
    wrong = wrong_answers(client, model)
    print(
        json.dumps({"model": model, "trained_s": trained_s, "right": len(WORDS) - len(wrong), "wrong": wrong})
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
