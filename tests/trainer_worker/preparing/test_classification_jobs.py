"""Jobs that train classifiers: from the queue to an adapter with a head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.formats.adapter import Adapter
from tessera.model.base_model import BaseModel
from tessera.queue.client import Job, JobStatus
from tests.trainer_worker.world import TENANT, World, messages

COLOURS = {"red": "roses and blood", "blue": "sky and sea", "green": "grass and leaves"}


@pytest.fixture
def world(redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path) -> World:
    return World(redis, tiny, chat, tmp_path)


def content(labels: dict[Any, str], *, copies: int = 6) -> bytes:
    rows = ({"text": f"{n} {text}", "label": label} for n in range(copies) for label, text in labels.items())
    return "\n".join(map(json.dumps, rows)).encode()


async def submit(world: World, name: str, training: bytes, **more: Any) -> str:
    options = {"problem_type": "single_label_classification", "head_learning_rate": "auto"}
    validation = more.pop("validation", None)
    fields = {
        "adapter_id": name,
        "training_file": await world.upload(training),
        "validation_file": None if validation is None else await world.upload(validation),
        "classification": options | more.pop("options", {}),
    }
    return await world.submit(lines=0, **(fields | more))


async def adapter_of(world: World, name: str) -> Adapter:
    ref = await world.adapters.resolve(TENANT, name)
    [blob] = await world.adapters.fetch([ref])
    return Adapter.of_version(ref, blob)


async def failed(world: World, job_id: str) -> dict[str, Any]:
    job: Job = await world.ended(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    return job.error


async def test_users_with_different_labels_train_together_beside_others(world: World) -> None:
    jobs = {
        "colours": await submit(world, "colours", content(COLOURS)),
        "numbers": await submit(world, "numbers", content({0: "nothing", 1: "something"})),
        "scores": await submit(
            world, "scores", content({1.0: "poor", 4.5: "great"}), options={"problem_type": "regression"}
        ),
        "probe": await submit(world, "probe", content(COLOURS), options={"head_only": True}),
        "writer": await world.submit("devil", adapter_id="writer"),
    }
    async with world.worker():
        ended = {name: await world.ended(job_id) for name, job_id in jobs.items()}

    assert {job.status for job in ended.values()} == {JobStatus.SUCCEEDED}
    labels = {name: (await adapter_of(world, name)).head for name in jobs}
    assert labels["writer"] is None
    for name, expected in {
        "colours": ("blue", "green", "red"),
        "numbers": ("0", "1"),
        "scores": (),
        "probe": ("blue", "green", "red"),
    }.items():
        head = labels[name]
        assert head is not None
        assert head.labels == expected
        assert head.weight[:, :-1].any()
    assert (await adapter_of(world, "colours")).R.any()
    assert not (await adapter_of(world, "probe")).R.any()
    [version] = (await world.adapters.get(TENANT, "colours")).versions
    plain = (await world.adapters.get(TENANT, "writer")).versions[0]
    colours = labels["colours"]
    assert colours is not None
    assert version.bytes > plain.bytes + colours.nbytes - 1000, "the head counts in the bytes of a version"
    assert version.metadata["classification"]["labels"] == ["blue", "green", "red"]
    said = messages(await world.events(jobs["colours"]), "Classification into 3 classes")
    assert said == ["Classification into 3 classes: cores and head, head learning rate 0.003"]
    metrics = [event.data for event in await world.events(jobs["colours"]) if event.type == "metrics"]
    assert metrics[0]["valid_loss"] == pytest.approx(1.0986, abs=1e-3)
    assert {"valid_accuracy"} <= metrics[0].keys()
    assert not any("token_accuracy" in name for event in metrics for name in event)


async def test_bad_files_fail_with_their_lines(world: World) -> None:
    one = await submit(world, "one", content({"x": "only"}))
    unseen = await submit(world, "unseen", content(COLOURS), validation=content({"pink": "pigs"}, copies=2))
    texts = await submit(world, "texts", b'{"text": "no label"}\n')
    labelled = await world.submit(lines=0, training_file=await world.upload(content(COLOURS)))
    scores = await submit(world, "scores", content(COLOURS), options={"problem_type": "regression"})
    async with world.worker():
        errors = [await failed(world, job_id) for job_id in (one, unseen, texts, labelled, scores)]
    assert [(error["param"], error["code"]) for error in errors] == [
        ("training_file", "invalid_training_file"),
        ("validation_file", "invalid_training_file"),
        ("training_file", "invalid_training_file"),
        ("method.type", "invalid_value"),
        ("training_file", "invalid_training_file"),
    ]
    assert "line 1: all lines have the label" in errors[0]["message"]
    assert 'line 1: the label "pink" does not occur in the training file; line 2:' in errors[1]["message"]
    assert "line 1: the line has no label" in errors[2]["message"]
    assert "classification" in errors[3]["message"]
    assert 'line 1: the label "red" is a name' in errors[4]["message"]


async def test_options_that_another_release_may_write_are_checked(world: World) -> None:
    kind = await submit(world, "kind", content(COLOURS), options={"problem_type": "ranking"})
    rate = await submit(world, "rate", content(COLOURS), options={"head_learning_rate": -1})
    async with world.worker():
        errors = [await failed(world, job_id) for job_id in (kind, rate)]
    assert [error["param"] for error in errors] == [
        "method.classification.problem_type", "method.classification.head_learning_rate",
    ]  # fmt: skip


async def test_another_worker_continues_a_classifier(world: World) -> None:
    fields: dict[str, Any] = {
        "hyperparameters": {"n_epochs": 30, "batch_size": 2},
        "early_stopping": {"patience": None},
    }
    job_id = await submit(world, "colours", content(COLOURS), **fields)
    async with world.worker():
        await world.under_way(job_id, 5)
    assert (await world.job(job_id)).status is JobStatus.QUEUED
    async with world.worker():
        job = await world.ended(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert messages(await world.events(job_id), "Training continues at step")
