"""Turn an exception into an HTTP response: the one table of status codes, and the one error body.

    {"error": {"message", "type", "param", "code"}}

Details that do not concern the caller (which host does not answer, the text of a bug) go to the log only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service.errors import (
    BodyTimeout,
    BodyTooLarge,
    DeadlineExceeded,
    ServiceOverloaded,
    ShuttingDown,
    Unauthenticated,
)
from service.http.schemas.common import UNION_TAG, ErrorBody
from service.http.schemas.fields import MAX_NAME_SHOWN, unknown_field
from tessera.errors import (
    AdapterReplaced,
    Conflict,
    CorruptRecord,
    EngineOverloaded,
    EngineUnavailable,
    InvalidInput,
    InvalidTrainingData,
    NotFound,
    RequestFailed,
    StoreFull,
    StoreUnavailable,
    TenantOverloaded,
    TesseraError,
    Unavailable,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """How an error is reported to the caller."""

    status: int
    #: The `type` field of the error body.
    type: str
    #: Replaces the error's own message; None keeps it.
    message: str | None = None
    #: The `retry-after` header: seconds after which the caller may try again.
    retry_after_s: int | None = None


#: Error class -> its row. A subclass that is not listed is reported like its nearest parent.
TABLE: dict[type[Exception], Row] = {
    InvalidInput: Row(400, "invalid_request_error"),
    Unauthenticated: Row(401, "authentication_error"),
    NotFound: Row(404, "invalid_request_error"),
    BodyTimeout: Row(408, "invalid_request_error"),
    Conflict: Row(409, "conflict_error"),
    CorruptRecord: Row(409, "conflict_error"),
    BodyTooLarge: Row(413, "invalid_request_error"),
    RequestFailed: Row(500, "server_error", "the engine gave up on this request"),
    DeadlineExceeded: Row(504, "timeout_error"),
    AdapterReplaced: Row(503, "unavailable_error", None, 1),
    StoreUnavailable: Row(503, "unavailable_error", "the store does not answer; try again", 1),
    StoreFull: Row(503, "unavailable_error", "the store is full", 30),
    EngineUnavailable: Row(503, "unavailable_error", "the engine is starting or restarting; try again", 2),
    EngineOverloaded: Row(503, "unavailable_error", "the engine's queue is full; try again", 1),
    TenantOverloaded: Row(429, "rate_limit_error", None, 1),
    ServiceOverloaded: Row(503, "unavailable_error", None, 1),
    ShuttingDown: Row(503, "unavailable_error", None, 5),
    Unavailable: Row(503, "unavailable_error", "not available at the moment; try again", 1),
    Exception: Row(500, "server_error", "internal error"),
}

#: Status -> code of the errors that the framework raises by itself.
HTTP_CODES = {400: "invalid_body", 404: "unknown_route", 405: "method_not_allowed", 413: "body_too_large"}

#: Statuses of requests that would fail again, so that client libraries must not repeat them.
PERMANENT = {409, 429}

#: How forms write a field of an object: `object[field]`.
_FORM_FIELD = re.compile(r"^(\w+)\[(\w+)\]$")

MAX_ERRORS_SHOWN = 20
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unknown_parameter": "unknown_parameter",
    "unsupported_parameter": "unsupported_parameter",
    "json_invalid": "invalid_json",
}

#: Plainer wordings for errors of pydantic and Starlette, by type or by message.
_SENTENCES = {
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
    "dict_type": "Input should be an object",
    "union_tag_not_found": "Input should be a string, a number, true, false or null",
    "Input should be 'auto'": "Input should be a number or 'auto'",
    "Expected UploadFile, received: <class 'str'>": "Input should be a file with a name",
}

_NAMES = {
    400: "the request is wrong",
    401: "no valid API key",
    404: "no such object, or not yours",
    408: "the body did not arrive in time",
    409: "in conflict with the stored state",
    413: "the body is too large",
    429: "too many requests of this tenant at once",
    500: "internal error",
    503: "try again later",
    504: "not finished in time",
}

#: The errors that every route may return, for OpenAPI.
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description} for status, description in _NAMES.items()
}


def error_body(
    message: str,
    kind: str,
    code: str | None,
    param: str | None = None,
    problems: Iterable[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the one form of an error body. problems: the errors of a file, line by line."""
    detail: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    if problems is not None:
        detail["errors"] = list(problems)
    return {"error": detail}


def row_of(error: Exception) -> Row:
    return next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)


def body_of(error: Exception) -> dict[str, Any]:
    """Return the error body of any exception. An event of a stream that has begun carries the same body."""
    row = row_of(error)
    if not isinstance(error, TesseraError):
        return error_body(row.message or "internal error", row.type, "internal_error")
    problems = None
    if isinstance(error, InvalidTrainingData):
        problems = [{"line": p.line, "code": p.code, "message": p.message} for p in error.errors]
    return error_body(row.message or error.message, row.type, error.code, error.param, problems)


def response_of(error: Exception) -> JSONResponse:
    """Return the HTTP response to any exception. Details that the caller does not get are logged."""
    row = row_of(error)
    if row.status >= 500:
        is_bug = row.status == 500
        level = logging.ERROR if is_bug else logging.WARNING
        logger.log(level, "answered %d: %s", row.status, error, exc_info=error if is_bug else None)
    headers = {} if row.retry_after_s is None else {"retry-after": str(row.retry_after_s)}
    if row.status in PERMANENT and row.retry_after_s is None:
        headers["x-should-retry"] = "false"
    if row.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body_of(error), row.status, headers)


def install(app: FastAPI) -> None:
    """Make `app` respond to every exception with the error body."""
    app.add_exception_handler(TesseraError, _on_tessera_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_tessera_error(request: Request, error: Exception) -> JSONResponse:
    return response_of(error)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {request.method} {request.url.path[:200]}",
        405: f"{request.method} is not allowed here",
    }.get(error.status_code, str(error.detail))
    code = HTTP_CODES.get(error.status_code, "invalid_request")
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return JSONResponse(error_body(message, kind, code), error.status_code, dict(error.headers or {}))


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """Put all problems into the message and the first one into param, but never the values that were sent."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    sentences = [_sentence(problem) for problem in problems[:MAX_ERRORS_SHOWN]]
    if len(problems) > MAX_ERRORS_SHOWN:
        sentences.append(f"and {len(problems) - MAX_ERRORS_SHOWN} more")
    code = _CODES.get(problems[0]["type"], "invalid_value")
    body = error_body("; ".join(sentences), "invalid_request_error", code, _param(problems[0]))
    return JSONResponse(body, 400)


def _sentence(problem: Mapping[str, Any]) -> str:
    param = _param(problem)
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem['ctx']['error']}"
    if param is None:
        return "the body must be a JSON object, sent with content-type: application/json"
    if _CODES.get(problem["type"]) == "unknown_parameter":
        known = problem.get("ctx", {}).get("known", ())
        return f"{param}: {unknown_field(str(problem['loc'][-1]), known)}"
    message = str(_SENTENCES.get(problem["type"], problem["msg"])).removeprefix("Value error, ")
    return f"{param}: {_SENTENCES.get(message, message)}"


def _param(problem: Mapping[str, Any]) -> str | None:
    """Return the dotted path to the field. Names that the caller chose are cut short."""
    if problem["type"] == "json_invalid":
        return None
    _, *path = problem["loc"]
    names = [str(part) for part in path if not str(part).startswith(UNION_TAG)]
    return shown_path(_FORM_FIELD.sub(r"\1.\2", name) for name in names) if names else None


def shown_path(parts: Iterable[object]) -> str:
    """Return a dotted path in ASCII. Names that the caller chose are cut short."""
    return ".".join(str(part)[:MAX_NAME_SHOWN].encode("ascii", "backslashreplace").decode() for part in parts)
