"""/v1/files."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from service.generation.text import TextCodec
from service.http.received_body import SPOOL_BYTES
from service.jobs.uploads import plain_name
from tessera.redis import keys
from tessera.store.files import RESULTS, FileStore
from tests.service.answers import check_error
from tests.service.conftest import MakeApp, client_of, served
from tests.service.training import EXAMPLE, GOOD, JOBS, upload
from tests.tessera.chat.tokenizer_kinds import tokenizer_of


async def test_a_file_is_kept_as_it_came(client: httpx.AsyncClient) -> None:
    record = (await upload(client)).json()

    assert record["id"].startswith("file-")
    assert record["object"] == "file"
    assert (record["bytes"], record["filename"], record["purpose"]) == (len(GOOD), "data.jsonl", "fine-tune")
    assert (record["status"], record["num_examples"]) == ("processed", 2)
    assert (await client.get(f"/v1/files/{record['id']}")).json() == record
    content = await client.get(f"/v1/files/{record['id']}/content")
    assert content.content == GOOD
    assert content.headers["content-type"] == "application/jsonl"
    assert content.headers["content-disposition"] == 'attachment; filename="data.jsonl"'


async def test_every_problem_is_reported_with_its_line(client: httpx.AsyncClient) -> None:
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


async def test_a_file_without_a_name_is_refused_in_plain_words(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("", GOOD)})
    assert reply.json()["error"]["message"] == "file: Input should be a file with a name"


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
        ({"files": {"other": ("a.jsonl", GOOD)}, "data": {"purpose": "fine-tune"}}, "other"),
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


async def test_a_purpose_is_looked_for_beyond_one_page(client: httpx.AsyncClient) -> None:
    purposes = ["fine-tune", "calibration", "fine-tune", "fine-tune", "calibration", "fine-tune"]
    ids = [(await upload(client, purpose=purpose)).json()["id"] for purpose in purposes]
    expected = [ids[4], ids[1]]

    first = (await client.get("/v1/files", params={"purpose": "calibration", "limit": 1})).json()
    second = (
        await client.get("/v1/files", params={"purpose": "calibration", "limit": 1, "after": expected[0]})
    ).json()

    assert [item["id"] for item in first["data"] + second["data"]] == expected
    assert (first["has_more"], second["has_more"]) == (True, False)


async def test_the_order_can_be_turned_round(client: httpx.AsyncClient) -> None:
    ids = [(await upload(client)).json()["id"] for _ in range(3)]

    page = (await client.get("/v1/files", params={"order": "asc", "limit": 2})).json()
    rest = (await client.get("/v1/files", params={"order": "asc", "after": page["last_id"]})).json()

    assert [item["id"] for item in page["data"] + rest["data"]] == ids
    error = check_error(await client.get("/v1/files", params={"order": "up"}), 400)
    assert error["param"] == "order"


async def test_a_file_expires_when_its_lifetime_ends(client: httpx.AsyncClient, redis: Redis) -> None:
    kept = (await upload(client)).json()
    form = {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    record = (await client.post("/v1/files", files={"file": ("a.jsonl", GOOD)}, data=form)).json()

    assert kept["expires_at"] is None
    assert record["expires_at"] == record["created_at"] + 3600
    assert (await client.get(f"/v1/files/{record['id']}")).json() == record
    names = keys.file_record("default", record["id"]), keys.file_content("default", record["id"])
    for name in names:
        assert await redis.expiretime(name) == record["expires_at"]
        await redis.expireat(name, 1)  # an hour later
    for url in (f"/v1/files/{record['id']}", f"/v1/files/{record['id']}/content"):
        assert check_error(await client.get(url), 404)["code"] == "file_not_found"
    page = (await client.get("/v1/files", params={"limit": 1})).json()
    assert ([item["id"] for item in page["data"]], page["has_more"]) == ([kept["id"]], False)
    assert await redis.zcard(keys.file_index("default")) == 1


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"anchor": "created_at"}, "expires_after.seconds"),
        ({"seconds": "3600"}, "expires_after.anchor"),
        ({"anchor": "last_active_at", "seconds": "3600"}, "expires_after.anchor"),
        ({"anchor": "created_at", "seconds": "3599"}, "expires_after.seconds"),
        ({"anchor": "created_at", "seconds": "2592001"}, "expires_after.seconds"),
        ({"anchor": "created_at", "seconds": "soon"}, "expires_after.seconds"),
    ],
)
async def test_a_lifetime_has_limits(client: httpx.AsyncClient, form: dict[str, str], param: str) -> None:
    data = {"purpose": "fine-tune"} | {f"expires_after[{name}]": value for name, value in form.items()}

    reply = await client.post("/v1/files", files={"file": ("a.jsonl", GOOD)}, data=data)

    assert check_error(reply, 400)["param"] == param


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


async def test_a_damaged_file_is_distinguished_from_a_missing_one(
    client: httpx.AsyncClient, redis: Redis
) -> None:
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


async def test_what_other_tools_write_is_taken(client: httpx.AsyncClient) -> None:
    """null counts as absent, a developer as the system, and messages may be dumps of the official client."""
    question, answer = {"role": "user", "content": "Define nose."}, {"role": "assistant", "content": "organ"}
    unused = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
    lines = [
        [
            {**question, "weight": None},
            {**answer, "weight": 0},
            {**question, "weight": None},
            {**answer, "weight": 1},
        ],
        [question, {**answer, **unused}],
        [{"role": "developer", "content": "Be brief."}, {**question, "name": "ann"}, answer],
        [question, {**answer, "content": [{"type": "text", "text": "organ"}]}],
    ]
    content = "\n".join(json.dumps({"messages": messages, "tools": None}) for messages in lines)
    reply = await upload(client, content.encode())
    assert reply.status_code == 200, reply.text
    assert reply.json()["num_examples"] == 4


@pytest.mark.parametrize("purpose", ["fine-tune", "calibration"])
async def test_what_the_chat_template_refuses_is_refused_at_the_upload(
    make_app: MakeApp, purpose: str
) -> None:
    codec = TextCodec(tokenizer_of("byte_level", "system_in_last_question"))
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    greeted = [{"role": "assistant", "content": "Hi."}, *asked]
    lines = [
        EXAMPLE,
        json.dumps({"messages": greeted}),
        '{"text": "<|end|>"}',
        json.dumps({"messages": greeted[:1]}),
    ]
    async with client_of(make_app(codec=codec)) as client:
        reply = await upload(client, "\n".join(lines).encode(), purpose=purpose)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "invalid_training_file")
    assert [(problem["line"], problem["code"]) for problem in error["errors"]] == [
        (2, "invalid_messages"), (3, "nothing_trained"), (4, "nothing_trained"),
    ]  # fmt: skip
    assert "must take turns" in error["errors"][0]["message"]


async def test_messages_for_a_model_without_a_template_are_refused_at_the_upload(make_app: MakeApp) -> None:
    codec = TextCodec(tokenizer_of("byte_level"))
    async with client_of(make_app(codec=codec)) as client:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        refused = await upload(client, json.dumps({"messages": messages}).encode())
        taken = await upload(client, b'{"prompt": "a", "completion": "b"}')
    assert [problem["code"] for problem in refused.json()["error"]["errors"]] == ["no_chat_template"]
    assert taken.status_code == 200


async def test_files_that_a_job_has_made_come_as_what_they_are(
    client: httpx.AsyncClient, redis: Redis
) -> None:
    """An uploaded page is never shown as one, because its author is not us."""
    made: dict[str, str] = {}
    for name in ("anna-metrics.csv", "anna-report.html"):
        record = await FileStore(redis).put("default", filename=name, purpose=RESULTS, content=b"x")
        made[name] = record.file_id
    uploaded = (await upload(client, filename="page.html")).json()["id"]

    replies = [await client.get(f"/v1/files/{file_id}/content") for file_id in [*made.values(), uploaded]]

    kinds = [reply.headers["content-type"].split(";")[0] for reply in replies]
    assert kinds == ["text/csv", "text/html", "application/jsonl"]
    for reply in replies:
        assert reply.headers["content-disposition"].startswith("attachment")
        assert "sandbox" in reply.headers["content-security-policy"]
    listed = (await client.get("/v1/files", params={"purpose": RESULTS})).json()["data"]
    assert {record["id"] for record in listed} == set(made.values())
    refused = await client.post(JOBS, json={"model": "tiny", "training_file": made["anna-metrics.csv"]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "training_file")
    for wrong in (RESULTS, "fine-tune-result"):
        reply = await upload(client, purpose=wrong)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "purpose")


async def test_a_large_upload_goes_through_a_file_and_comes_back_whole(make_app: MakeApp) -> None:
    """4 MiB of many chunks, over a socket: beyond what is kept in memory, at odd sizes of pieces."""
    lines = [json.dumps({"prompt": f"{n}: ", "completion": "x" * (1 + n % 977)}) for n in range(1, 9001)]
    content = "\n".join(lines).encode()
    assert len(content) > 4 * SPOOL_BYTES
    async with served(make_app()) as base, httpx.AsyncClient(base_url=base, timeout=60) as client:
        reply = await upload(client, content)
        assert reply.status_code == 200, reply.text
        record = reply.json()
        assert (record["bytes"], record["num_examples"]) == (len(content), 9000)
        assert record["sha256"] == hashlib.sha256(content).hexdigest()
        assert (await client.get(f"/v1/files/{record['id']}/content")).content == content


async def test_more_examples_than_the_setting_allows_are_refused(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_MAX_EXAMPLES", "5")
    line = f"{EXAMPLE}\n".encode()
    async with client_of(make_app()) as client:
        assert (await upload(client, line * 5)).status_code == 200
        reply = await upload(client, line * 6)
    [error] = reply.json()["error"]["errors"]
    assert (reply.status_code, error["line"], error["code"]) == (400, 6, "too_many_examples")
    assert "at most 5 examples" in error["message"]
