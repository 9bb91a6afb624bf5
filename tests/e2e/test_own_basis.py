"""A basis of the user's own data, from the request to the text that its adapter writes, and its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Stack
from tests.e2e.test_openai_client import PROMPT, training_file
from tests.waiting import wait_until_sync

pytestmark = pytest.mark.xdist_group("e2e")

#: The quickest decomposition: what is tested is the way, not the quality.
OPTIONS = {"svd": "randomised"}


def test_an_adapter_in_a_basis_of_its_own_is_trained_served_and_deleted(
    stack: Stack, client: openai.OpenAI, tmp_path: Path
) -> None:
    file = client.files.create(file=training_file(tmp_path, 20), purpose="fine-tune")
    basis = {"method": "lora_sb", "calibration": "own", "options": OPTIONS}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        seed=1,
        hyperparameters={"n_epochs": 1},
        extra_body={"adapter": {"id": "own", "rank": 4, "basis": basis, "init": "sb_step"}},
    )

    def ended() -> Any:
        found = client.fine_tuning.jobs.retrieve(job.id)
        return found if found.status in ("succeeded", "failed", "cancelled") else None

    done: Any = wait_until_sync(ended)
    assert done.status == "succeeded", done.error
    own = f"{stack.url}/v1/bases/{done.adapter['basis']}"
    detail = httpx.get(own).json()
    texts = [
        client.chat.completions.create(model=model, messages=PROMPT, max_tokens=12, temperature=0)
        for model in ("own", "tiny")
    ]
    in_use = httpx.delete(own)
    client.models.delete("own")
    gone = httpx.get(own)

    assert (detail["is_own"], detail["method"], detail["rank"]) == (True, "lora_sb", 4)
    assert detail["recipe"]["options"]["svd"] == "randomised"
    assert done.result["start"]["losses"]["0"] > min(done.result["start"]["losses"].values())
    assert texts[0].adapter == {"id": "own", "version": 1}  # type: ignore[attr-defined]
    assert texts[0].choices[0].message.content != texts[1].choices[0].message.content
    assert (in_use.status_code, in_use.json()["error"]["code"]) == (409, "basis_in_use")
    assert gone.status_code == 404
