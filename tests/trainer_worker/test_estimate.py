"""The estimate of a job against the same job as a worker really does it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.errors import InvalidInput, InvalidTrainingData
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from tessera.queue.records import JobSpec
from tessera.store.bases import BasisStore
from tests.preferences import preference_lines
from tests.trainer_worker.conftest import DATA
from tests.trainer_worker.world import World
from trainer_worker.estimate import error_as_json, estimate


def lines(count: int, name: str = "devil") -> bytes:
    return b"\n".join((DATA / f"{name}.jsonl").read_bytes().split(b"\n")[:count])


def ask(
    training: bytes, *, validation: bytes = b"", basis: Basis | None = None, **spec: Any
) -> dict[str, Any]:
    job = JobSpec(**{"adapter_id": "a", "training_file": "f", "base_model": "tiny", "seed": 7, **spec})
    preconditioner = b"" if basis is None else basis.preconditioner_bytes()
    head = {
        "spec": json.loads(job.to_json()), "created_at": time.time(),
        "sizes": [len(training), len(validation), len(preconditioner)],
        "basis": None if basis is None else basis.manifest.to_json(),
    }  # fmt: skip
    return estimate(head, training + validation + preconditioner)


async def test_it_says_what_the_worker_then_does(
    redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_WORKER_LEARNING_RATE_SEARCH", "0")
    world = World(redis, tiny, chat, tmp_path)
    hyperparameters = {"n_epochs": 2}
    job_id = await world.submit(lines=30, hyperparameters=hyperparameters, early_stopping={"patience": None})
    async with world.worker(learning_rate_search=False):
        job = await world.ended(job_id)
    assert job.result is not None
    basis = await BasisStore(redis).get(job.result["basis_id"])

    told = ask(
        lines(30), basis=basis, rank=8, hyperparameters=hyperparameters, early_stopping={"patience": None}
    )

    assert told["steps"] == job.result["steps"]
    assert told["tokens"]["trained"] == job.result["trained_tokens"]
    assert told["data"] == {**job.result["data"], "truncated": 0}
    chosen = job.progress["hyperparameters"]
    shown = {name: value for name, value in told["hyperparameters"].items() if name in chosen}
    assert shown == {
        name: pytest.approx(chosen[name]) if name == "learning_rate" else chosen[name] for name in shown
    }
    assert len(shown) >= 7
    assert told["warnings"] == job.result["warnings"]


def test_data_that_deserve_a_warning_get_it() -> None:
    told = ask(lines(4) + b"\n" + lines(4), hyperparameters={"max_length": 24})
    assert {warning["code"] for warning in told["warnings"]} >= {
        "many_duplicates",
        "no_validation",
        "truncated",
    }
    assert told["data"]["num_duplicates"] == 4
    assert told["data"]["num_distinct_answers"] == 4
    assert told["data"]["truncated"] > 0
    assert told["hyperparameters"]["learning_rate"] == "auto"
    assert told["tokens"]["evaluated"] == 0


def test_a_search_is_foretold() -> None:
    told = ask(lines(40))
    assert told["searched_multiples"] == [1.0, 3.0, 10.0, 0.3]
    assert told["hyperparameters"]["learning_rate"] == "auto"
    assert ask(lines(40), hyperparameters={"learning_rate": 1e-3})["searched_multiples"] == []


def test_it_refuses_what_a_worker_refuses() -> None:
    with pytest.raises(InvalidTrainingData) as caught:
        ask(lines(3), validation=b'{"text": 3}\n', validation_file="v")
    fields = error_as_json(caught.value)
    assert json.loads(json.dumps(fields))["errors"][0]["line"] == 1
    with pytest.raises(InvalidInput, match="n_epochs"):
        ask(lines(3), hyperparameters={"n_epochs": 0})


def test_a_lora_form_has_a_rate_without_a_basis() -> None:
    told = ask(lines(20), form="lora", method="pissa", rank=8)
    assert told["hyperparameters"]["learning_rate"] > 0


def test_pairs_are_counted_with_their_reference() -> None:
    """It is computed once, over the pairs to train on and the held-out ones."""
    pairs = "\n".join(preference_lines()).encode()
    told, free = (
        ask(pairs, objective="dpo", objective_options=options) for options in ({}, {"reference_free": True})
    )
    assert told["data"]["num_examples"] == 40
    assert told["hyperparameters"].items() >= {"beta": 0.1, "loss_type": "sigmoid"}.items()
    extra = told["tokens"]["evaluated"] - free["tokens"]["evaluated"]
    held_out = free["tokens"]["evaluated"] / told["num_evaluations"]
    assert extra == told["tokens"]["per_epoch"] + held_out
    with pytest.raises(InvalidTrainingData, match="the file holds pairs"):
        ask(lines(3), objective="dpo")
    with pytest.raises(InvalidTrainingData, match="method dpo"):
        ask(pairs)
