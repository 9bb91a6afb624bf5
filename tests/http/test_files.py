"""/v1/files."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from adapter_core import keys
from service.uploads import plain_name
from tests.http.conftest import MakeApp, client_of
from tests.http.training import EXAMPLE, GOOD, upload


async def test_a_file_is_kept_as_it_came(client: httpx.AsyncClient) -> None:
    record = (await upload(client)).json()

    assert record["id"].startswith("file-")
    assert record["object"] == "file"
    assert (record["bytes"], record["filename"], record["purpose"]) == (len(GOOD), "data.jsonl", "fine-tune")
    assert (record["status"], record["num_examples"]) == ("processed", 2)
    assert (await client.get(f"/v1/files/{record['id']}")).json() == record
    content = await client.get(f"/v1/files/{record['id']}/content")
    assert content.content == GOOD
    assert content.headers["content-disposition"] == 'attachment; filename="data.jsonl"'


async def test_every_problem_is_told_with_its_line(client: httpx.AsyncClient) -> None:
    content = "\n".join(
        [EXAMPLE, "{oops", '{"messages": [{"role": "user", "content": "x"}]}', '{"text": ""}']
    )

    reply = await upload(client, content.encode())

    error = reply.json()["error"]
    assert reply.status_code == 400
    assert (error["code"], error["param"]) == ("invalid_training_file", "file")
    assert [problem["line"] for problem in error["errors"]] == [2, 3, 4]
    assert all(f"line {line}:" in error["message"] for line in (2, 3, 4))
    assert all(problem["code"] and problem["message"] for problem in error["errors"])


@pytest.mark.parametrize(
    "content", [b"", b"\n \n", b"\xef\xbb\xbf"], ids=["nothing", "blank lines", "a mark"]
)
async def test_a_file_without_examples_is_refused(client: httpx.AsyncClient, content: bytes) -> None:
    reply = await upload(client, content)

    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "empty_file"


async def test_a_file_that_is_no_text_is_refused(client: httpx.AsyncClient) -> None:
    reply = await upload(client, b"\x80\x04\x95pickle")

    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_training_file"


async def test_only_training_files_are_taken(client: httpx.AsyncClient) -> None:
    reply = await upload(client, purpose="assistants")

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "purpose"


@pytest.mark.parametrize(
    ("request_options", "param"),
    [
        ({"data": {"purpose": "fine-tune"}}, "file"),
        ({"files": {"file": ("a.jsonl", GOOD)}}, "purpose"),
        ({"files": {"other": ("a.jsonl", GOOD)}, "data": {"purpose": "fine-tune"}}, "file"),
        ({"json": {"purpose": "fine-tune"}}, "file"),
    ],
    ids=["no file", "no purpose", "another field", "JSON"],
)
async def test_an_incomplete_form_is_refused(
    client: httpx.AsyncClient, request_options: dict[str, Any], param: str
) -> None:
    reply = await client.post("/v1/files", **request_options)

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


async def test_a_broken_form_is_refused(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}

    reply = await client.post("/v1/files", content=b"--y\r\nnonsense", headers=headers)

    assert reply.status_code == 400
    assert set(reply.json()) == {"error"}


async def test_uploads_have_a_limit_of_their_own(make_app: MakeApp) -> None:
    line = f"{EXAMPLE}\n".encode()
    async with client_of(make_app(max_body_bytes=1024, max_upload_bytes=10_000)) as client:
        assert (await upload(client, line * 100)).status_code == 200
        assert (await upload(client, line * 1000)).status_code == 413


async def test_files_are_listed_newest_first_in_pages(client: httpx.AsyncClient) -> None:
    ids = [(await upload(client, filename=f"{n}.jsonl")).json()["id"] for n in range(5)]

    seen, after = [], None
    while True:
        params = {"limit": 2} if after is None else {"limit": 2, "after": after}
        page = (await client.get("/v1/files", params=params)).json()
        seen += [item["id"] for item in page["data"]]
        assert page["object"] == "list"
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert seen == ids[::-1]


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 101}, {"limit": "x"}])
async def test_a_page_has_limits(client: httpx.AsyncClient, params: dict[str, Any]) -> None:
    reply = await client.get("/v1/files", params=params)

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "limit"


async def test_a_deleted_file_is_gone(client: httpx.AsyncClient) -> None:
    file_id = (await upload(client)).json()["id"]

    assert (await client.delete(f"/v1/files/{file_id}")).json() == {
        "id": file_id,
        "object": "file",
        "deleted": True,
    }
    for method, url in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        reply = await client.request(method, f"/v1/files/{file_id}{url}")
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "file_not_found"


async def test_a_damaged_file_is_told_from_a_missing_one(client: httpx.AsyncClient, redis: Redis) -> None:
    file_id = (await upload(client)).json()["id"]
    await redis.setrange(keys.file_content("default", file_id), 3, b"\x00\x00")

    reply = await client.get(f"/v1/files/{file_id}/content")

    assert reply.status_code == 409
    assert reply.json()["error"]["code"] == "corrupt_record"
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\x.jsonl", "x.jsonl"),
        ('a"b\r\nc.jsonl', "a_b__c.jsonl"),
        ("größe (1).jsonl", "größe (1).jsonl"),
        ("", "file.jsonl"),
        ("x" * 300, "x" * 255),
    ],
)
def test_a_filename_is_made_plain(given: str, kept: str) -> None:
    assert plain_name(given) == kept
