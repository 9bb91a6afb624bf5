"""Classifiers of several users over the whole stack: upload, train, classify."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Stack
from tests.waiting import wait_until_sync

pytestmark = pytest.mark.xdist_group("e2e")

SIZES = ("house", "tree", "stone", "lamp", "door", "ship", "hill", "horse")
#: Tasks that the bundled model can learn from few examples: which adjective, and whether two nouns are equal.
TASKS: dict[str, list[dict[str, Any]]] = {
    "size": [
        {"text": f"a {word} {noun}", "label": label}
        for noun in SIZES
        for label, word in {"large": "big", "small": "little", "old": "ancient"}.items()
    ],
    "same": [
        {"sentence1": f"the {a}", "sentence2": f"the {b}", "label": int(a == b)}
        for a in SIZES
        for b in (a, SIZES[(SIZES.index(a) + 3) % len(SIZES)])
    ],
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = Stack(tmp_path_factory.mktemp("stack"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def trained(stack: Stack) -> openai.OpenAI:
    client, jobs = stack.client, []
    for name, rows in TASKS.items():
        content = "\n".join(map(json.dumps, rows)).encode()
        file = client.files.create(file=(f"{name}.jsonl", content), purpose="fine-tune")
        body = {
            "model": "tiny",
            "training_file": file.id,
            "seed": 1,
            "method": {
                "type": "classification",
                "classification": {"hyperparameters": {"n_epochs": 20, "validation_split": 0}},
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


def test_the_classes_come_back(stack: Stack, trained: openai.OpenAI) -> None:
    found = classify(stack, "size", [row["text"] for row in TASKS["size"]])
    assert [item["label"] for item in found] == [row["label"] for row in TASKS["size"]]
    assert {item["num_classes"] for item in found} == {3}
    unseen = classify(stack, "size", ["a big river", "a little river", "an ancient river"])
    assert [item["label"] for item in unseen] == ["large", "small", "old"]
    pairs = [{"text_a": row["sentence1"], "text_b": row["sentence2"]} for row in TASKS["same"]]
    same = classify(stack, "same", pairs)
    right = sum(item["label"] == str(row["label"]) for item, row in zip(same, TASKS["same"], strict=True))
    assert right >= 12  # of 16


def test_an_adapter_says_what_it_is_for(stack: Stack, trained: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="/v1/classify") as refusal:
        trained.completions.create(model="size", prompt="a big")
    assert refusal.value.code == "model_not_generative"
    reply = httpx.post(f"{stack.url}/v1/classify", json={"model": "tiny", "input": "a big house"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "no_classification_head")
    words = [{"role": "user", "content": "Define love."}]
    assert trained.chat.completions.create(model="tiny", messages=words).choices[0].message.content  # type: ignore[call-overload]
    described = httpx.get(f"{stack.url}/v1/adapters/size").json()["versions"][0]
    assert described["metadata"]["classification"]["labels"] == ["large", "old", "small"]
