"""`docs/api.md` describes the routes as they are: fields, defaults, limits, answers, errors, examples."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from service.app import create_app, stores_over
from service.generation.text import load_text_codec
from service.http.errors import HTTP_CODES, TABLE
from service.http.schemas import bases, classify, generation, resources, score, training
from service.settings import ServiceSettings
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import TesseraError
from tessera.redis.client import connect
from tessera.settings import CommonSettings
from tests.fakes import FakeEngine

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
_FIELDS_OF_BOTH = "Fields of both endpoints"

#: A request's schema → the sections whose tables have its fields.
REQUESTS: Mapping[type[BaseModel], tuple[str, ...]] = {
    generation.CompletionRequest: ("`POST /v1/completions`", _FIELDS_OF_BOTH),
    generation.ChatCompletionRequest: ("`POST /v1/chat/completions`", _FIELDS_OF_BOTH),
    generation.ChatMessage: ("`POST /v1/chat/completions`",),
    generation.StreamOptions: (_FIELDS_OF_BOTH,),
    score.ScoreRequest: ("`POST /v1/score`",),
    score.ScoredMessage: ("`POST /v1/score`", "`POST /v1/chat/completions`"),
    score.Conversation: ("`POST /v1/score`",),
    score.PromptAndCompletion: ("`POST /v1/score`",),
    score.PlainText: ("`POST /v1/score`",),
    classify.ClassifyRequest: ("`POST /v1/classify`",),
    classify.TextPair: ("`POST /v1/classify`",),
    training.Classification: ("Classifiers",),
    training.FineTuningJobRequest: ("`POST /v1/fine_tuning/jobs`",),
    training.Hyperparameters: ("`POST /v1/fine_tuning/jobs`",),
    training.AdapterOptions: ("`POST /v1/fine_tuning/jobs`",),
    training.EarlyStopping: ("`POST /v1/fine_tuning/jobs`",),
    resources.AdapterPatchRequest: ("`PATCH /v1/adapters/{adapter_id}`",),
    bases.BasisJobRequest: ("`POST /v1/bases`",),
}

#: Bodies that the examples send, by path.
BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/completions": generation.CompletionRequest,
    "/v1/chat/completions": generation.ChatCompletionRequest,
    "/v1/score": score.ScoreRequest,
    "/v1/classify": classify.ClassifyRequest,
    "/v1/fine_tuning/jobs": training.FineTuningJobRequest,
    "/v1/bases": bases.BasisJobRequest,
    "/v1/adapters/anna-f884da30": resources.AdapterPatchRequest,
}

#: Described once for all routes that take them.
COMMON_HEADERS = {"idempotency-key", "x-stainless-retry-count"}

#: Codes that no caller sees: said between our own processes, or replaced by a nearer one.
INTERNAL = {
    "cancel_not_requested",
    "cancelled",
    "integrity_violated",
    "not_found",
    "stale_lease",
    "unavailable",
    "unsupported_model",
}

#: Of the tables of fields: field, default, range, meaning.
COLUMNS = 4

#: Words of JSON schema for a bound.
LIMITS = (
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("minLength", "maxLength", "minItems", "maxItems", "maxProperties"),
)


def section(heading: str) -> str:
    """From a heading to the next one."""
    return re.split(r"^##+ ", PAGE.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| field"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


def described(headings: tuple[str, ...]) -> dict[str, list[tuple[str, str]]]:
    """Name of a field, without what it stands in → (default, range) of the rows that begin with it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for heading in headings:
        for cells in rows(section(heading)):
            for name in re.findall(r"`([^`]+)`", cells[0]) if len(cells) == COLUMNS else ():
                found.setdefault(re.split(r"[.…]+", name)[-1], []).append((cells[1].strip("`"), cells[2]))
    return found


def limits(schema: Any) -> set[float]:
    """The numbers that bound a value or what is in it, but for those of 64 bits and 0 as "not negative"."""
    found: set[float] = set()
    for key, value in schema.items() if isinstance(schema, dict) else ():
        if key in LIMITS and value != 0 and abs(value) < 2**62:
            found.add(float(value))
        for part in value if isinstance(value, list) else [value]:
            found |= limits(part)
    return found


def numbers(text: str) -> set[float]:
    """The numbers of a cell; 2³¹ - 1 as one of them."""
    superscripts = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    found: set[float] = set()
    for base, power, minus in re.findall(r"(\d+)([⁰¹²³⁴-⁹]+)( - 1)?", text):
        found.add(float(int(base) ** int(power.translate(superscripts)) - bool(minus)))
    found |= {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)}
    return found


def written(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default if field.default_factory is None else field.default_factory()  # type: ignore[call-arg]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value) if not isinstance(value, BaseModel) else ""


@pytest.mark.parametrize("schema", REQUESTS, ids=lambda schema: schema.__name__)
def test_every_field_of_a_request_has_a_row_with_its_default_and_limits(schema: type[BaseModel]) -> None:
    told = described(REQUESTS[schema])
    properties = schema.model_json_schema()["properties"]

    missing = [
        (name, written(field), limits(properties[name]))
        for name, field in schema.model_fields.items()
        if not any(
            default in (written(field), "") and limits(properties[name]) <= numbers(bounds)
            for default, bounds in told.get(name, ())
        )
    ]
    assert missing == []


def test_every_row_describes_a_field() -> None:
    known: dict[str, set[str]] = {}
    for schema, headings in REQUESTS.items():
        for heading in headings:
            known.setdefault(heading, set()).update(schema.model_fields)

    for heading, names in known.items():
        assert set(described((heading,))) <= names, heading


@pytest_asyncio.fixture
async def schema(tmp_path: Path) -> AsyncIterator[dict[str, Any]]:
    """The schema of the application, whose store is never called."""
    async with connect("redis://127.0.0.1:1") as redis:
        common = CommonSettings(data_dir=tmp_path)
        app: FastAPI = create_app(
            engine=FakeEngine(),
            stores=stores_over(redis, common),
            codec=load_text_codec(BUNDLED_MODEL),
            settings=ServiceSettings(),
            common=common,
        )
        yield app.openapi()


def operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            yield f"`{method.upper()} {path}`", operation


def test_every_query_parameter_and_header_is_described_at_its_route(schema: dict[str, Any]) -> None:
    missing = [
        (heading, parameter["name"])
        for heading, operation in operations(schema)
        for parameter in operation.get("parameters", ())
        if parameter["in"] != "path" and not _is_described(parameter["name"], heading)
    ]
    assert missing == []


def _is_described(name: str, heading: str) -> bool:
    text = section(heading) if name.lower() not in COMMON_HEADERS else section("Idempotency")
    return re.search(rf"`{re.escape(name)}\b", text, re.IGNORECASE) is not None


def test_every_field_of_an_answer_is_named_in_its_part_of_the_page(schema: dict[str, Any]) -> None:
    parts = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    common = "".join(part for part in parts if part.startswith(("Requests", "Lists", "Completions")))
    missing = []
    for heading, operation in operations(schema):
        part = next(part for part in parts if f"### {heading}\n" in part)
        for name in answered(operation, schema):
            if not re.search(rf"\b{name}\b", part + common):
                missing.append((heading, name))
    assert missing == []


def answered(operation: dict[str, Any], schema: dict[str, Any]) -> set[str]:
    """The names of all fields of an operation's answer, in whatever depth."""
    found: set[str] = set()
    answers = [answer for status, answer in operation["responses"].items() if status in ("200", "202")]
    waiting, seen = [answers], set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            found |= set(node.get("properties", ()))
            waiting += node.values()
            if isinstance(name := node.get("$ref"), str) and name not in seen:
                seen.add(name)
                waiting.append(schema["components"]["schemas"][name.rsplit("/", 1)[-1]])
    return found


def examples() -> Iterator[tuple[str, str]]:
    """Path and JSON body of every call of curl that sends one."""
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL):
        for command in block.replace("\\\n", " ").split("\ncurl "):
            words = shlex.split(command)
            if "-d" in words:
                url = next(word for word in words if word.startswith("http://"))
                yield url.removeprefix("http://127.0.0.1:8000"), words[words.index("-d") + 1]


def test_every_example_of_a_request_is_a_request() -> None:
    found = list(examples())

    for path, body in found:
        BODIES[path].model_validate_json(body)
    assert {path for path, _ in found} == set(BODIES)


def test_every_error_has_the_status_and_type_that_the_page_says() -> None:
    told = {
        code: (int(cells[0]), cells[1].strip("`"))
        for cells in rows(section("Errors"))
        if cells[0].isdigit()
        for code in re.findall(r"`([a-z_]+)`", cells[2])
    }
    known = {
        error.code: (row.status, row.type)
        for error, row in TABLE.items()
        if issubclass(error, TesseraError) and error.code not in INTERNAL
    }
    known |= {code: (status, "invalid_request_error") for status, code in HTTP_CODES.items()}

    assert {code: told.get(code) for code in known} == known


def test_every_code_of_an_error_is_on_a_page_and_every_one_there_exists() -> None:
    pages = PAGE + (ROOT / "docs" / "training-data.md").read_text(encoding="utf-8")
    codes = set(codes_in_the_code())

    assert {code for code in codes - INTERNAL if f"`{code}`" not in pages} == set()


def codes_in_the_code() -> Iterator[str]:
    """Every text that is given as a `code`."""
    for folder in ("tessera", "service", "trainer_worker"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                named = node.value if isinstance(node, ast.keyword) and node.arg == "code" else None
                if isinstance(named, ast.Constant) and isinstance(named.value, str):
                    yield named.value
