"""An encoder as the base model of a whole stack: it classifies for several users and generates nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Stack
from tests.encoders import make_tokenizer, save_masked
from tests.waiting import wait_until_sync

pytestmark = pytest.mark.xdist_group("e2e")

NOUNS = ("cup", "door", "hat", "boat", "lamp", "coat")
COLOURS = ("red", "blue", "green")


def rows_of(task: str) -> list[dict[str, Any]]:
    rng, rows = random.Random(3), []
    for _ in range(60):
        noun, colour = rng.choice(NOUNS), rng.choice(COLOURS)
        if task == "colour":
            rows.append({"text": f"the {noun} is {colour}", "label": colour})
        else:
            pair = {"premise": f"the {rng.choice(NOUNS)}", "hypothesis": f"a {noun} is {colour}"}
            rows.append({**pair, "label": 2.5 * COLOURS.index(colour)})
    return rows


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = tmp_path_factory.mktemp("models") / "bert-small"
    save_masked("bert", model, vocab_size=300, initializer_range=0.1)
    make_tokenizer([f"the {noun} is {colour} a" for noun in NOUNS for colour in COLOURS], model)
    running = Stack(tmp_path_factory.mktemp("stack"), TESSERA_BASE_MODEL=str(model), TESSERA_RANK="8")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def trained(stack: Stack) -> openai.OpenAI:
    client, jobs = stack.client, []
    for name in ("colour", "shade"):
        content = "\n".join(map(json.dumps, rows_of(name))).encode()
        file = client.files.create(file=(f"{name}.jsonl", content), purpose="fine-tune")
        kind = "regression" if name == "shade" else "single_label_classification"
        body = {
            "model": "bert-small",
            "training_file": file.id,
            "seed": 1,
            "method": {
                "type": "classification",
                "classification": {
                    "problem_type": kind,
                    "hyperparameters": {"n_epochs": 20, "validation_split": 0},
                },
            },
            "early_stopping": {"patience": None},
            "adapter": {"id": name},
        }
        reply = httpx.post(f"{stack.url}/v1/fine_tuning/jobs", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        jobs.append(reply.json()["id"])

    def have_ended() -> bool:
        found = [client.fine_tuning.jobs.retrieve(job) for job in jobs]
        assert all(job.error is None or not job.error.message for job in found), found
        return all(job.status == "succeeded" for job in found)

    wait_until_sync(have_ended)
    return client


def classify(stack: Stack, model: str, texts: list[Any]) -> list[dict[str, Any]]:
    reply = httpx.post(f"{stack.url}/v1/classify", json={"model": model, "input": texts}, timeout=60)
    assert reply.status_code == 200, reply.text
    return list(reply.json()["data"])


def test_the_classes_and_scores_come_back(stack: Stack, trained: openai.OpenAI) -> None:
    rows = rows_of("colour")
    found = classify(stack, "colour", [row["text"] for row in rows])
    assert [item["label"] for item in found] == [row["label"] for row in rows]
    pairs = rows_of("shade")
    scored = classify(
        stack, "shade", [{"text_a": row["premise"], "text_b": row["hypothesis"]} for row in pairs]
    )
    assert all(item["label"] is None and item["num_classes"] == 1 for item in scored)
    means = []
    for label in (0.0, 2.5, 5.0):
        own = [item["probs"][0] for item, row in zip(scored, pairs, strict=True) if row["label"] == label]
        means.append(sum(own) / len(own))
    assert means == sorted(means)
    assert means[2] > means[0] + 1, "the scores are in the units of the data"


def test_nothing_is_generated(stack: Stack, trained: openai.OpenAI) -> None:
    for model in ("bert-small", "colour"):
        for call in (
            lambda model=model: trained.completions.create(model=model, prompt="the cup"),
            lambda model=model: trained.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "the cup"}]
            ),
        ):
            with pytest.raises(openai.BadRequestError) as refusal:
                call()
            assert refusal.value.code == "model_not_generative"
    reply = httpx.post(
        f"{stack.url}/v1/score", json={"model": "bert-small", "input": [{"text": "the cup is red"}]}
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "model_not_generative")
    file = trained.files.create(file=("a.jsonl", b'{"prompt": "a", "completion": "b"}'), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as refusal:
        trained.fine_tuning.jobs.create(model="bert-small", training_file=file.id)
    assert refusal.value.param == "method.type"
