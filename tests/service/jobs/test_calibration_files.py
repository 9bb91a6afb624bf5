"""Files for calibration: which user an example belongs to, and which requests accept such a file."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.service.training import GOOD, JOBS, upload


def content_of(*users: str | None) -> bytes:
    values = [{"prompt": "a", "completion": "b", **({"user": user} if user else {})} for user in users]
    return "\n".join(json.dumps(value) for value in values).encode()


async def test_users_are_distinguished_in_a_file_for_calibration(client: httpx.AsyncClient) -> None:
    content = content_of("ann", "bob", "ann", "bob")
    record = (await upload(client, content, purpose="calibration")).json()
    reply = await client.post(
        "/v1/bases", json={"method": "population", "rank": 4, "calibration_file": record["id"]}
    )

    assert (record["purpose"], record["num_examples"]) == ("calibration", 4)
    assert (await client.get(f"/v1/files/{record['id']}/content")).content == content
    listed = (await client.get("/v1/files", params={"purpose": "calibration"})).json()["data"]
    assert [file["id"] for file in listed] == [record["id"]]
    assert reply.status_code == 202, reply.text
    assert reply.json()["calibration_file"] == record["id"]


async def test_either_kind_of_file_builds_a_basis(client: httpx.AsyncClient) -> None:
    for purpose in ("fine-tune", "calibration"):
        file_id = (await upload(client, purpose=purpose)).json()["id"]
        reply = await client.post(
            "/v1/bases", json={"method": "lora_sb", "rank": 4, "calibration_file": file_id}
        )
        assert reply.status_code == 202, reply.text


async def test_a_job_may_name_it_for_its_basis_but_not_train_on_it(client: httpx.AsyncClient) -> None:
    ours = (await upload(client, content_of("a", "a", "b", "b"), purpose="calibration")).json()["id"]
    training = (await upload(client, GOOD)).json()["id"]
    adapter = {"rank": 4, "basis": {"method": "population", "calibration": ours}}

    good = await client.post(JOBS, json={"model": "tiny", "training_file": training, "adapter": adapter})
    bad = await client.post(JOBS, json={"model": "tiny", "training_file": ours})
    also_bad = await client.post(
        JOBS, json={"model": "tiny", "training_file": training, "validation_file": ours}
    )

    assert good.status_code == 200, good.text
    for reply, param in ((bad, "training_file"), (also_bad, "validation_file")):
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == param
        message = reply.json()["error"]["message"]
        assert "has the purpose 'calibration', but 'fine-tune' is required" in message


@pytest.mark.parametrize(
    ("purpose", "users", "line", "code"),
    [
        ("calibration", ("ann", None, "ann"), 2, "missing_user"),
        ("calibration", ("ann", "ann", "bob"), 3, "user_too_small"),
        ("fine-tune", ("ann", "ann"), 1, "unknown_key"),
    ],
)
async def test_the_upload_reports_what_is_wrong(
    client: httpx.AsyncClient, purpose: str, users: tuple[str | None, ...], line: int, code: str
) -> None:
    reply = await upload(client, content_of(*users), purpose=purpose)

    assert reply.status_code == 400
    first = reply.json()["error"]["errors"][0]
    assert (first["line"], first["code"]) == (line, code)
