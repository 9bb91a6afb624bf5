"""kill -9 of each part in the middle of its work: the others go on, and nothing acknowledged is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.conftest import Stack
from tests.e2e.test_openai_client import training_file
from tests.waiting import wait_until_sync

pytestmark = pytest.mark.xdist_group("recovery")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own: the other tests must not see its parts die."""
    running = Stack(tmp_path_factory.mktemp("stack"))
    yield running
    running.stop()


def start_job(client: openai.OpenAI, tmp_path: Path, adapter: str, num_epochs: int) -> str:
    file = client.files.create(file=training_file(tmp_path, 40), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        hyperparameters={"n_epochs": num_epochs},
        extra_body={"adapter": {"id": adapter}, "early_stopping": {"patience": 1000}},
    )
    return job.id


def step_of(client: openai.OpenAI, job_id: str) -> int:
    return int((client.fine_tuning.jobs.retrieve(job_id).progress or {}).get("step") or 0)


def status_of(client: openai.OpenAI, job_id: str) -> str:
    return client.fine_tuning.jobs.retrieve(job_id).status


def versions_of(client: openai.OpenAI, adapter: str) -> list[int]:
    return [v["version"] for v in client.get(f"/adapters/{adapter}", cast_to=object)["versions"]]


def works(client: openai.OpenAI) -> bool:
    try:
        return bool(client.completions.create(model="tiny", prompt="The program", max_tokens=3).choices)
    except (openai.APIStatusError, openai.APIConnectionError):
        return False


def test_a_killed_worker_is_replaced_and_the_job_publishes_once(
    stack: Stack, client: openai.OpenAI, tmp_path: Path
) -> None:
    job_id = start_job(client, tmp_path, "worker-dies", num_epochs=12)
    wait_until_sync(lambda: step_of(client, job_id) > 0)

    killed = stack.kill("trainer_worker")

    wait_until_sync(lambda: status_of(client, job_id) == "succeeded")
    assert stack.find("trainer_worker").pid != killed
    assert versions_of(client, "worker-dies") == [1]


def test_a_killed_engine_fails_what_was_running_and_comes_back(stack: Stack, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="The program", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)

    stack.kill("service.engine")

    with pytest.raises(openai.APIError):
        list(stream)
    assert httpx.get(f"{stack.url}/health/live").status_code == 200
    wait_until_sync(lambda: works(client))


def test_a_killed_store_comes_back_with_everything_acknowledged(
    stack: Stack, client: openai.OpenAI, tmp_path: Path
) -> None:
    done = start_job(client, tmp_path, "before-the-fall", num_epochs=1)
    wait_until_sync(lambda: status_of(client, done) == "succeeded")
    running = start_job(client, tmp_path, "in-the-fall", num_epochs=6)
    wait_until_sync(lambda: step_of(client, running) > 0)

    stack.kill("valkey-server", "redis-server")

    def readable() -> bool:
        try:
            return status_of(client, done) == "succeeded"
        except (openai.APIStatusError, openai.APIConnectionError):
            return False

    wait_until_sync(readable)
    assert versions_of(client, "before-the-fall") == [1]
    wait_until_sync(lambda: readable() and status_of(client, running) == "succeeded")
    assert versions_of(client, "in-the-fall") == [1]
    assert works(client)
