"""Jobs on preference pairs: from the queue to an adapter, beside supervised jobs, and interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from redis.asyncio import Redis

from tessera.chat.chat_format import ChatFormat
from tessera.data.pairs import parse_pairs
from tessera.errors import InvalidTrainingData
from tessera.formats.adapter import Adapter
from tessera.model.base_model import BaseModel
from tessera.queue.client import Job, JobStatus
from tests.job_checks import check_queue
from tests.preferences import preference_lines
from tests.trainer_worker.world import TENANT, World, messages
from tests.waiting import wait_until
from trainer_worker.data.pairs import encode_pairs
from trainer_worker.preparing.preparation import read_data

DPO = {"objective": "dpo", "early_stopping": {"patience": None}}


@pytest.fixture
def world(redis: Redis, tiny: BaseModel, chat: ChatFormat, tmp_path: Path) -> World:
    return World(redis, tiny, chat, tmp_path)


#: The default rate moves little in the few steps of these tests.
NUMBERS = {"n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 3}


async def submit(world: World, name: str, *, lines: int = 12, **spec: Any) -> str:
    content = "\n".join(preference_lines()[:lines]).encode()
    return await world.submit(
        adapter_id=name,
        **{**DPO, "training_file": await world.upload(content), "hyperparameters": NUMBERS, **spec},
    )


async def stored(world: World, name: str) -> Adapter:
    ref = await world.adapters.resolve(TENANT, name)
    [blob] = await world.adapters.fetch([ref])
    return Adapter.of_version(ref, blob)


def best(job: Job) -> float:
    assert job.status is JobStatus.SUCCEEDED, job.error
    assert job.result is not None
    return float(job.result["best_valid_loss"])


async def test_pairs_and_answers_train_side_by_side(world: World) -> None:
    """Each as if it were alone; the events of the job with pairs have TRL's names."""
    alone = await world.submit(adapter_id="alone", epochs=2, early_stopping={"patience": None})
    pairs_alone = await submit(world, "pairs-alone")
    async with world.worker(max_resident_jobs=1):
        for job_id in (alone, pairs_alone):
            await world.ended(job_id)
    jobs = {
        "beside": await world.submit(adapter_id="beside", epochs=2, early_stopping={"patience": None}),
        "pairs": await submit(world, "pairs"),
        "form": await submit(world, "form", form="lora", method="lora", rank=4),
    }
    async with world.worker(max_resident_jobs=3) as worker:
        ended = {name: await world.ended(job_id) for name, job_id in jobs.items()}
        await wait_until(lambda: not worker.sessions)
    for name in ("pairs", "form"):
        result = ended[name].result
        assert result is not None
        assert result["initial_valid_loss"] == pytest.approx(0.6931, abs=1e-3), name
        assert best(ended[name]) < 0.6, name
    for one, other in (("beside", "alone"), ("pairs", "pairs-alone")):
        torch.testing.assert_close(
            (await stored(world, one)).R, (await stored(world, other)).R, atol=2e-4, rtol=1e-2
        )
    events = await world.events(jobs["pairs"])
    assert messages(events, "Reference log-probabilities of 12 of 12 pairs")
    metrics = [event.data for event in events if event.type == "metrics"]
    assert any({"rewards/chosen", "rewards/rejected", "rewards/margins"} <= data.keys() for data in metrics)
    last = [data for data in metrics if "valid_loss" in data][-1]
    assert last["eval_rewards/accuracies"] == 1.0
    assert last["eval_rewards/margins"] > 0
    assert not any("mean_token_accuracy" in name for data in metrics for name in data)
    result = ended["pairs"].result
    assert result is not None
    table, report = [await world.files.content(TENANT, file_id) for file_id in result["result_files"]]
    assert table.splitlines()[0] == b"step,train_loss,rewards/accuracies,valid_loss,eval_rewards/accuracies"
    assert "pairs in which the preferred answer gained more" in report.decode()
    await check_queue(world.redis)


async def test_an_interrupted_job_gives_the_same_bits(world: World) -> None:
    numbers = {**NUMBERS, "n_epochs": 8}  # long enough to be met under way
    whole, job_id = [await submit(world, name, hyperparameters=numbers) for name in "ab"]
    async with world.worker(max_resident_jobs=1):
        await world.ended(whole)
        await world.under_way(job_id, step=2)
    async with world.worker(max_resident_jobs=1):
        assert (await world.ended(job_id)).status is JobStatus.SUCCEEDED
    assert messages(await world.events(job_id), "continues")
    assert torch.equal((await stored(world, "a")).R, (await stored(world, "b")).R)


async def test_the_reference_of_a_continued_adapter_is_that_adapter(world: World) -> None:
    """So the loss begins at that of a coin again, although the adapter prefers the captain already."""
    async with world.worker(max_resident_jobs=1):
        first = await world.ended(await submit(world, "anna"))
        basis_id = first.result["basis_id"] if first.result else None
        again = await world.ended(await submit(world, "anna", warm_start_from="anna@1", basis_id=basis_id))
        from_base = await world.ended(await submit(world, "new", basis_id=basis_id))
    assert again.result is not None
    assert from_base.result is not None
    assert again.result["initial_valid_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert from_base.result["initial_valid_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert best(first) < 0.6


async def test_a_basis_and_an_init_learn_from_the_preferred_answers_only(world: World) -> None:
    """The first step goes towards what should be said; the reference stays the base model."""
    spec = {"method": "lora_sb", "calibration": "own", "start": {"method": "sb_step"}, "rank": 4}
    swapped = [json.loads(line) for line in preference_lines()[:12]]
    for value in swapped:
        value["non_preferred_output"] = [{"role": "assistant", "content": "No."}]
    content = "\n".join(map(json.dumps, swapped)).encode()
    async with world.worker(max_resident_jobs=1):
        job = await world.ended(await submit(world, "a", **spec))
        other = await world.ended(await submit(world, "b", **spec, training_file=await world.upload(content)))
    assert job.result is not None
    assert other.result is not None
    assert job.result["basis_id"] == other.result["basis_id"], "built from the same answers"
    assert job.result["initial_valid_loss"] != pytest.approx(0.6931, abs=1e-3), "the init has made a step"


async def test_files_and_methods_that_do_not_fit_fail_with_the_lines(world: World) -> None:
    content = "\n".join(preference_lines()[:3]).encode()
    async with world.worker(max_resident_jobs=1):
        supervised = await world.ended(await world.submit(training_file=await world.upload(content)))
        pairs = await world.ended(await world.submit(objective="dpo"))
        unknown = await world.ended(await world.submit(objective="grpo"))
        wrong = await world.ended(await submit(world, "w", objective_options={"beta": -1}))
    for job in (supervised, pairs, unknown, wrong):
        assert job.status is JobStatus.FAILED
        assert job.error is not None
    assert "for jobs with the method dpo" in supervised.error["message"]  # type: ignore[index]
    assert "the file holds pairs" in pairs.error["message"]  # type: ignore[index]
    assert unknown.error["param"] == "method.type"  # type: ignore[index]
    assert wrong.error["param"] == "method.dpo.hyperparameters.beta"  # type: ignore[index]


def test_all_pairs_with_one_prompt_are_on_one_side(chat: ChatFormat) -> None:
    """Otherwise the same question would be learned and held out."""
    lines = [json.loads(line) for line in preference_lines()]
    more = [
        {**value, "non_preferred_output": [{"role": "assistant", "content": f"No, {number}."}]}
        for number, value in enumerate(lines)
    ]
    pairs = parse_pairs("\n".join(map(json.dumps, [*lines, *more])).encode())
    data = encode_pairs(chat, pairs, max_tokens=128)
    assert (data.num_train, data.num_valid) == (64, 16)

    def prompts(examples: Any) -> set[tuple[int, ...]]:
        return {tuple(rows[0].token_ids[: rows[0].loss_mask.index(True)]) for rows in examples}

    assert not prompts(data.train_examples) & prompts(data.valid_examples)
    assert data.train_chosen == (1,) * 64
    assert len(data.answers) == 64


def test_a_validation_file_holds_pairs_too(chat: ChatFormat) -> None:
    training, held_out = ("\n".join(preference_lines(part)).encode() for part in ("train", "heldout"))
    data = read_data(chat, training, held_out, max_tokens=128, is_preference=True)
    assert (data.num_train, data.num_valid, data.num_overlapping) == (40, 10, 0)
    again = read_data(chat, training, training, max_tokens=128, is_preference=True)
    assert again.num_overlapping == 40
    with pytest.raises(InvalidTrainingData):
        read_data(chat, training, b'{"text": "a b"}', max_tokens=128, is_preference=True)
