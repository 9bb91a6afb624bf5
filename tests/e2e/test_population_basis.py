"""A basis learned from several users' examples, from the upload of their file to its recipe."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Stack
from tests.waiting import wait_until_sync

pytestmark = pytest.mark.xdist_group("e2e")


def users_file(*users: str) -> bytes:
    values = [
        {"prompt": f"Define {index}.", "completion": f"{user} says {index}.", "user": user}
        for index, user in enumerate(users)
    ]
    return "\n".join(json.dumps(value) for value in values).encode()


def ended(stack: Stack, file_id: str, **options: Any) -> dict[str, Any]:
    """The finished job of a small basis."""
    body = {
        "method": "population", "rank": 2, "calibration_file": file_id, "target_modules": ["q_proj"],
        "options": {"passes": 0.1, "num_slots": 2, "batch_size": 1, "svd": "randomised", **options},
    }  # fmt: skip
    reply = httpx.post(f"{stack.url}/v1/bases", json=body)
    assert reply.status_code == 202, reply.text

    def job() -> dict[str, Any] | None:
        found = dict(httpx.get(f"{stack.url}/v1/bases/jobs/{reply.json()['id']}").json())
        return found if found["status"] in ("succeeded", "failed", "cancelled") else None

    return dict(wait_until_sync(job))


def test_users_are_told_apart_on_the_whole_way(stack: Stack, client: openai.OpenAI) -> None:
    content = users_file("ann", "bob", "cleo", "ann", "bob", "cleo", "ann")
    file = client.files.create(file=("users.jsonl", content), purpose="calibration")  # type: ignore[arg-type]

    job = ended(stack, file.id)

    assert job["status"] == "succeeded", job["error"]
    detail = httpx.get(f"{stack.url}/v1/bases/{job['basis']}").json()
    account = detail["recipe"]["population"]
    assert (account["num_users"], account["examples_per_user"]) == (3, [2, 3])
    assert account["held_out"] is None
    assert httpx.delete(f"{stack.url}/v1/bases/{job['basis']}").status_code == 200


def test_one_user_is_no_population(stack: Stack, client: openai.OpenAI) -> None:
    file = client.files.create(file=("one.jsonl", users_file("ann", "ann")), purpose="calibration")  # type: ignore[arg-type]

    job = ended(stack, file.id)

    assert job["status"] == "failed"
    assert "a population has at least 2 users, this one 1" in job["error"]["message"]
