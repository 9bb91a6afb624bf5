"""/v1/fine_tuning/jobs with method.type "classification": what is taken, and what is refused by its path."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tessera.store.adapters import AdapterStore
from tests.service.conftest import publish
from tests.service.training import BASIS_ID, JOBS, create, upload

LABELLED = b'{"text": "one", "label": "a"}\n{"text": "two", "label": "b"}\n'


@pytest_asyncio.fixture
async def labelled(client: httpx.AsyncClient) -> str:
    reply = await upload(client, LABELLED)
    assert reply.status_code == 200, reply.text
    assert reply.json()["num_examples"] == 2
    return str(reply.json()["id"])


async def test_the_options_of_a_classifier_are_kept(client: httpx.AsyncClient, labelled: str) -> None:
    options = {"problem_type": "regression", "head_learning_rate": 0.01, "head_only": True}
    method = {
        "type": "classification",
        "classification": {**options, "hyperparameters": {"n_epochs": 3}},
    }
    job = await create(client, labelled, method=method)
    assert job["method"]["type"] == "classification"
    kept = job["method"]["classification"]
    assert {name: kept[name] for name in options} == options
    assert kept["hyperparameters"]["n_epochs"] == job["hyperparameters"]["n_epochs"] == 3
    assert "supervised" not in job["method"]


async def test_the_defaults_of_a_classifier(client: httpx.AsyncClient, labelled: str) -> None:
    job = await create(client, labelled, method={"type": "classification"})
    kept = job["method"]["classification"]
    assert kept["problem_type"] == "single_label_classification"
    assert (kept["head_learning_rate"], kept["head_only"]) == ("auto", False)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"classification": {"head_learning_rate": 0}}, "method.classification.head_learning_rate"),
        ({"classification": {"head_learning_rate": "fast"}}, "method.classification.head_learning_rate"),
        ({"classification": {"problem_type": "ranking"}}, "method.classification.problem_type"),
        ({"classification": {"num_labels": 2}}, "method.classification.num_labels"),
        ({"supervised": {}}, "method.supervised"),
    ],
)
async def test_wrong_options_are_named(
    client: httpx.AsyncClient, labelled: str, body: dict[str, Any], param: str
) -> None:
    sent = {"model": "tiny", "training_file": labelled, "method": {"type": "classification", **body}}
    reply = await client.post(JOBS, json=sent)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"adapter": {"form": "lora"}}, "adapter.form"),
        ({"adapter": {"init": "zero"}}, "adapter.init"),
        ({"adapter": {"basis": "lora_sb"}}, "adapter.basis"),
        ({"model": "anna"}, "model"),
    ],
)
async def test_what_a_classifier_cannot_begin_with(
    client: httpx.AsyncClient, labelled: str, adapters: AdapterStore, body: dict[str, Any], param: str
) -> None:
    await publish(adapters, "anna", basis_id=BASIS_ID)
    sent = {"model": "tiny", "training_file": labelled, "method": {"type": "classification"}, **body}
    reply = await client.post(JOBS, json=sent)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_problems_of_a_labelled_file_have_their_lines(client: httpx.AsyncClient) -> None:
    lines = [{"text": "a", "label": "x"}, {"text": "", "label": "x"}, {"text": "b"}]
    reply = await upload(client, "\n".join(map(json.dumps, lines)).encode())
    found = [(error["line"], error["code"]) for error in reply.json()["error"]["errors"]]
    assert (reply.status_code, found) == (400, [(2, "empty_text"), (3, "missing_label")])


async def test_a_file_of_another_kind_is_refused_at_once(client: httpx.AsyncClient, file_id: str) -> None:
    sent = {"model": "tiny", "training_file": file_id, "method": {"type": "classification"}}
    reply = await client.post(JOBS, json=sent)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "training_file")
