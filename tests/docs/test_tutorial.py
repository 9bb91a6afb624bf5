"""`docs/tutorial.md`: its code parses, and the calls, endpoints, fields and metrics in it exist."""

from __future__ import annotations

import ast
import codeop
import inspect
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import openai
from fastapi import FastAPI

from tests.deploy.exposed_metrics import service_registry
from tests.docs.tables import metrics_table

TEXT = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
SERVER = "http://127.0.0.1:8000"

#: The client's calls on the page, and the endpoints behind them.
ENDPOINTS = {
    "models.list": ("get", "/v1/models"),
    "files.create": ("post", "/v1/files"),
    "files.content": ("get", "/v1/files/{file_id}/content"),
    "fine_tuning.jobs.create": ("post", "/v1/fine_tuning/jobs"),
    "fine_tuning.jobs.retrieve": ("get", "/v1/fine_tuning/jobs/{job_id}"),
    "fine_tuning.jobs.list_events": ("get", "/v1/fine_tuning/jobs/{job_id}/events"),
    "chat.completions.create": ("post", "/v1/chat/completions"),
}
#: Names of variables on the page, and the call that gives them their value.
VARIABLES = {"file": "files.create", "job": "fine_tuning.jobs.create", "answer": "chat.completions.create"}


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def session() -> ast.Module:
    """All Python blocks, which a reader types into one session."""
    return ast.parse("\n".join(blocks("python")))


def dotted(node: ast.AST) -> list[str]:
    """["client", "files", "create"] for `client.files.create`; empty for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return [*before, node.attr]
    return []


def calls() -> list[tuple[str, ast.Call]]:
    """Every call of the client: its name without `client.`, and the call."""
    found = [(dotted(node.func), node) for node in ast.walk(session()) if isinstance(node, ast.Call)]
    return [(".".join(name[1:]), node) for name, node in found if name[:1] == ["client"]]


def resolved(schema: dict[str, Any], part: Any) -> Any:
    """`part` of a schema without references, alternatives put together."""
    if "$ref" in part:
        return resolved(schema, schema["components"]["schemas"][part["$ref"].rsplit("/", 1)[1]])
    options = [resolved(schema, option) for option in part.get("anyOf", ())]
    properties = {name: value for option in options for name, value in option.get("properties", {}).items()}
    return {**part, "properties": {**properties, **part.get("properties", {})}}


def request_fields(schema: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    [content] = schema["paths"][path][method]["requestBody"]["content"].values()
    properties: dict[str, Any] = resolved(schema, content["schema"])["properties"]
    return properties


def check_fields(schema: dict[str, Any], known: dict[str, Any], given: dict[str, Any]) -> None:
    assert set(given) <= set(known)
    for name, value in given.items():
        if isinstance(value, dict):
            check_fields(schema, resolved(schema, known[name])["properties"], value)


def test_every_block_parses() -> None:
    compile(session(), "tutorial.md", "exec")
    for block in blocks("json"):
        json.loads(block)
    for block in blocks("sh"):
        subprocess.run(["sh", "-n"], input=block, text=True, check=True)


def test_every_python_block_can_be_typed() -> None:
    """An interactive session wants an empty line after a loop, where a file does not."""
    for block in blocks("python"):
        typed: list[str] = []
        for line in [*block.splitlines(), ""]:
            typed.append(line)
            if codeop.compile_command("\n".join(typed), symbol="single") is not None:
                typed = []
        assert typed == []


def test_the_client_has_every_call_and_the_service_every_field(app: FastAPI) -> None:
    client = openai.OpenAI(base_url="http://127.0.0.1:1", api_key="unused")
    schema = app.openapi()
    named = {name for name, _ in calls()}

    assert named - {"post"} == set(ENDPOINTS)
    for name, call in calls():
        function: Any = client
        for part in name.split("."):
            function = getattr(function, part)
        given = {keyword.arg or "": keyword.value for keyword in call.keywords}
        assert set(given) <= set(inspect.signature(function).parameters), name
        if name != "post" and ENDPOINTS[name][0] == "post":
            extra = ast.literal_eval(given.pop("extra_body", ast.Dict([], [])))
            fields = request_fields(schema, *ENDPOINTS[name])
            check_fields(schema, fields, {**dict.fromkeys(given), **extra})


def test_paths_of_the_client_that_are_written_out_exist(app: FastAPI) -> None:
    schema = app.openapi()
    posts = [call for name, call in calls() if name == "post"]

    assert posts
    for call in posts:
        path = f"/v1{ast.literal_eval(call.args[0])}"
        [body] = [keyword.value for keyword in call.keywords if keyword.arg == "body"]
        assert isinstance(body, ast.Dict)
        names = {ast.literal_eval(key) for key in body.keys if key is not None}
        assert names <= set(request_fields(schema, "post", path))


def test_every_field_of_an_answer_exists(app: FastAPI) -> None:
    schema = app.openapi()
    reads = {tuple(dotted(node)[:2]) for node in ast.walk(session()) if isinstance(node, ast.Attribute)}

    for variable, call in VARIABLES.items():
        method, path = ENDPOINTS[call]
        content = schema["paths"][path][method]["responses"]["200"]["content"]["application/json"]
        known = set(resolved(schema, content["schema"])["properties"])
        read = {name for owner, name in (each for each in reads if len(each) == 2) if owner == variable}
        assert read
        assert read <= known


def test_every_request_of_curl_has_a_route(app: FastAPI) -> None:
    routes = {
        (method, re.compile(re.sub(r"\{[^}]+\}", "[^/]+", path)))
        for path, item in app.openapi()["paths"].items()
        for method in item
    }
    commands = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    requests = [line for line in commands if SERVER in line]

    assert len(requests) > 5
    for line in requests:
        [path] = re.findall(rf"{SERVER}([\w/.-]*)", line)
        named = re.search(r"-X ([A-Z]+)", line)
        method = named[1].lower() if named else "post" if " -F " in line else "get"
        assert any(method == known and route.fullmatch(path) for known, route in routes), line


def test_every_metric_exists() -> None:
    metrics = {line.split("{")[0].split()[0] for line in TEXT.splitlines() if line.startswith("tessera_")}
    known = set(re.findall(r"`(tessera_\w+)`", metrics_table(service_registry())))

    assert metrics
    assert metrics <= known
