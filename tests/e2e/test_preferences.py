"""A preference learned through the API: which of two voices answers questions that were held out."""

from __future__ import annotations

import json
import math
from typing import Any

import openai
import pytest

from tests.e2e.conftest import Stack
from tests.preferences import preference_lines
from tests.waiting import wait_until_sync

pytestmark = pytest.mark.xdist_group("e2e")


def upload(client: openai.OpenAI, name: str, lines: list[str]) -> str:
    content = "\n".join(lines).encode()
    return client.files.create(file=(f"{name}.jsonl", content), purpose="fine-tune").id


def ended(client: openai.OpenAI, job_id: str) -> Any:
    def final() -> Any:
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in ("succeeded", "failed", "cancelled") else None

    return wait_until_sync(final)


def margins(client: openai.OpenAI, model: str) -> list[float]:
    """How much more likely the captain's answer is than the butler's, for every held-out question."""
    pairs = [json.loads(line) for line in preference_lines("heldout")]
    items = [
        {"messages": [*pair["input"]["messages"], *pair[key]]}
        for key in ("preferred_output", "non_preferred_output")
        for pair in pairs
    ]
    reply: Any = client.post("/score", body={"model": model, "input": items}, cast_to=object)
    sums = [score["sum_logprob"] for score in reply["data"]]
    return [
        chosen - rejected for chosen, rejected in zip(sums[: len(pairs)], sums[len(pairs) :], strict=True)
    ]


def test_a_preference_is_learned_with_openais_client_beside_a_supervised_job(
    stack: Stack, client: openai.OpenAI
) -> None:
    training, held_out = (upload(client, part, preference_lines(part)) for part in ("train", "heldout"))
    examples = [json.loads(line) for line in preference_lines()[:12]]
    other = upload(
        client,
        "examples",
        [
            json.dumps({"messages": [*pair["input"]["messages"], *pair["preferred_output"]]})
            for pair in examples
        ],
    )
    supervised = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=other,
        hyperparameters={"n_epochs": 1},
        extra_body={"adapter": {"id": "beside", "rank": 8}},
    )
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training,
        validation_file=held_out,
        seed=1,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 2}}},
        extra_body={"adapter": {"id": "captain", "rank": 16}},
    )

    done = ended(client, job.id)
    beside = ended(client, supervised.id)
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    before, after = margins(client, "tiny"), margins(client, "captain")
    gained = [new - old for new, old in zip(after, before, strict=True)]

    assert done.status == "succeeded", done.error
    assert beside.status == "succeeded", beside.error
    assert done.method.type == "dpo"
    assert done.method.dpo.hyperparameters.beta == 0.1
    metrics = [event.data for event in events if event.type == "metrics"]
    evaluated = [data for data in metrics if "eval_rewards/accuracies" in data]  # newest first
    assert evaluated[0]["eval_rewards/accuracies"] == 1.0
    assert evaluated[0]["eval_rewards/margins"] > evaluated[-1]["eval_rewards/margins"]
    assert done.result["initial_valid_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert done.result["best_valid_loss"] < 0.5
    assert min(gained) > 0, "every held-out question, as the engine serves it"
    assert 0.1 * sum(gained) / len(gained) == pytest.approx(
        max(data["eval_rewards/margins"] for data in evaluated), rel=0.05
    )


def test_wrong_pairs_are_refused_at_the_upload(client: openai.OpenAI) -> None:
    good = json.loads(preference_lines()[0])
    same = {**good, "non_preferred_output": good["preferred_output"]}
    with pytest.raises(openai.BadRequestError) as caught:
        upload(client, "bad", [json.dumps(good), json.dumps(same)])
    body: Any = caught.value.body
    assert [(problem["line"], problem["code"]) for problem in body["errors"]] == [(2, "identical_answers")]


def test_a_file_of_pairs_needs_the_method(client: openai.OpenAI) -> None:
    training = upload(client, "pairs", preference_lines()[:3])
    with pytest.raises(openai.BadRequestError, match="only the method dpo trains"):
        client.fine_tuning.jobs.create(model="tiny", training_file=training)
