"""Helpers of the tests of bad requests: valid requests to spoil, and the one shape of an error."""

from __future__ import annotations

from typing import Any

import httpx

TEXT, CHAT, SCORE, JOBS = "/v1/completions", "/v1/chat/completions", "/v1/score", "/v1/fine_tuning/jobs"
HELLO = [{"role": "user", "content": "hello"}]
SOUND: dict[str, dict[str, Any]] = {
    TEXT: {"model": "tiny", "prompt": "a"},
    CHAT: {"model": "tiny", "messages": HELLO},
    SCORE: {"model": "tiny", "input": [{"text": "one two"}]},
    JOBS: {"model": "tiny", "training_file": "file-" + "0" * 24},
}


def check_error(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, checked to have the one shape."""
    assert reply.status_code == status, reply.text
    assert reply.headers["x-request-id"]
    body = reply.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"]
    assert isinstance(error["code"], str)
    return dict(error)
