"""The stock `openai` client against a running stack: the whole life of an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import DATA, Stack
from tests.waiting import wait_until_sync

pytestmark = pytest.mark.xdist_group("e2e")

PROMPT = [{"role": "user", "content": "Define love."}]


@pytest.fixture(scope="module")
def trained(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of an adapter trained through the API on a small file."""
    client = stack.client
    file = client.files.create(file=training_file(tmp_path_factory.mktemp("data"), 40), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=client.models.list().data[0].id,
        training_file=file.id,
        suffix="devil",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    )
    wait_until_sync(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
    name = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert name
    return name


def training_file(folder: Path, num_examples: int, user: str = "devil") -> Path:
    lines = (DATA / f"{user}.train.jsonl").read_text().splitlines()[:num_examples]
    path = folder / f"{user}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_models_lists_the_base_and_the_trained_adapter(client: openai.OpenAI, trained: str) -> None:
    names = [model.id for model in client.models.list()]

    assert names[0] == "tiny"
    assert trained in names


def test_completion_and_streamed_chat_agree(client: openai.OpenAI, trained: str) -> None:
    whole = client.chat.completions.create(model=trained, messages=PROMPT, max_tokens=12, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=trained,
            messages=PROMPT,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-1].choices == []
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, count) == getattr(whole.usage, count)
    text = client.completions.create(model="tiny", prompt="The program", max_tokens=5, temperature=0)
    assert text.usage.completion_tokens == 5


def test_the_adapter_changes_the_score(client: openai.OpenAI, trained: str) -> None:
    lines = (DATA / "devil.heldout.jsonl").read_text().splitlines()[:20]
    items = [{"messages": json.loads(line)["messages"]} for line in lines]

    losses = {
        model: client.post("/score", body={"model": model, "input": items}, cast_to=object)["loss"]
        for model in ("tiny", trained)
    }

    assert losses[trained] < losses["tiny"]


def test_training_again_under_one_name_publishes_the_next_version(
    client: openai.OpenAI, tmp_path: Path
) -> None:
    file = client.files.create(file=training_file(tmp_path, 12, "jargon"), purpose="fine-tune")
    for expected in (1, 2):
        job = client.fine_tuning.jobs.create(
            model="tiny",
            training_file=file.id,
            seed=expected,
            hyperparameters={"n_epochs": 1},
            extra_body={"adapter": {"id": "retrained", "rank": 4}},
        )
        wait_until_sync(lambda job=job: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
        record = client.get("/adapters/retrained", cast_to=object)
        assert record["active_version"] == expected
    pinned = client.completions.create(model="retrained@1", prompt="A hacker", max_tokens=3, temperature=0)
    assert pinned.model == "retrained@1"


def test_result_files_can_be_read(client: openai.OpenAI, trained: str) -> None:
    job = next(job for job in client.fine_tuning.jobs.list() if job.fine_tuned_model == trained)

    metrics, report = (client.files.content(file_id) for file_id in job.result_files)

    lines = metrics.text.splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert len(lines) == job.model_extra["result"]["steps"] + 2
    assert report.text.startswith("<!doctype html>")
    assert report.text.count('class="sample"') >= 1
    assert client.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"
    assert isinstance(job.hyperparameters.learning_rate_multiplier, float)
    names = [state.fine_tuned_model_checkpoint for state in client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert names[0] == f"{trained}@1"
    assert len(names) == 4
    answer = client.chat.completions.create(model=names[1], messages=PROMPT, max_tokens=3, temperature=0)
    assert answer.model_extra["adapter"] == {"id": names[1], "version": None}


def test_events_tell_the_story_of_a_job(client: openai.OpenAI, trained: str) -> None:
    job = next(job for job in client.fine_tuning.jobs.list() if job.fine_tuned_model == trained)

    events = list(client.fine_tuning.jobs.list_events(job.id))

    assert job.trained_tokens
    assert any(event.type == "metrics" for event in events)
    assert "succeeded" in events[0].message.lower()


def test_a_deleted_adapter_is_gone_at_once(stack: Stack, client: openai.OpenAI, tmp_path: Path) -> None:
    file = client.files.create(file=training_file(tmp_path, 12), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, suffix="gone", hyperparameters={"n_epochs": 1}
    )
    wait_until_sync(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
    name = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    client.completions.create(model=name, prompt="A", max_tokens=1)

    assert client.models.delete(name).deleted

    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model=name, prompt="A", max_tokens=1)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(name)
