"""What real processes write to standard error: text for people, or JSON lines that a machine can parse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import logging, threading, warnings
from tessera.processes.log_setup import log_fields, set_up_logging
set_up_logging("engine", level="WARNING")
log = logging.getLogger("some.module")
log.info("not written")
log.warning("two\\nlines of %s", "ünï")
before = log_fields.set({"request_id": "req_1"})
log_fields.set({**log_fields.get(), "tenant": "acme"})
try:
    1 / 0
except ZeroDivisionError:
    log.exception("division failed")
log_fields.reset(before)
log.warning("after the request")
warnings.warn("old thing")
def run(): raise KeyError("gone")
thread = threading.Thread(target=run, name="loader"); thread.start(); thread.join()
raise RuntimeError("nobody catches this")
"""

UVICORN = """
import uvicorn
from tessera.processes.log_setup import set_up_logging
set_up_logging("service")
async def app(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no engine"})
uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None)).run()
"""

LIBRARY = """
import logging
library = logging.getLogger("transformers")
library.addHandler(logging.StreamHandler()); library.propagate = False
from tessera.processes.log_setup import set_up_logging
set_up_logging("trainer")
logging.getLogger("transformers.generation").warning("once only")
"""


def stderr_of(*command: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TESSERA_")}
    done = subprocess.run(
        [sys.executable, *command], env={**inherited, **environment}, capture_output=True, text=True
    )
    return done.stderr


def json_lines(*command: str, **environment: str) -> list[dict[str, Any]]:
    text = stderr_of(*command, TESSERA_LOG_FORMAT="json", **environment)
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_is_one_json_object() -> None:
    lines = json_lines("-c", SCRIPT)

    assert [line["level"] for line in lines] == [
        "WARNING", "ERROR", "WARNING", "WARNING", "CRITICAL", "CRITICAL",
    ]  # fmt: skip
    assert {line["process"] for line in lines} == {"engine"}
    assert len({line["pid"] for line in lines}) == 1
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in lines)
    first, failed, _, warned, thread, uncaught = lines
    assert (first["logger"], first["message"]) == ("some.module", "two\nlines of ünï")
    assert "ZeroDivisionError" in failed["exception"]
    assert "old thing" in warned["message"]
    assert "loader" in thread["message"]
    assert "KeyError" in thread["exception"]
    assert uncaught["exception"].endswith("RuntimeError: nobody catches this")


def test_a_json_line_names_request_and_tenant_while_they_last() -> None:
    lines = json_lines("-c", SCRIPT)

    assert (lines[1]["request_id"], lines[1]["tenant"]) == ("req_1", "acme")
    assert all("request_id" not in line for line in (lines[0], *lines[2:]))


def test_text_has_the_same_parts_and_the_traceback_below() -> None:
    lines = stderr_of("-c", SCRIPT).splitlines()

    assert re.fullmatch(r"\S+Z WARNING engine some\.module: two", lines[0])
    assert lines[-1] == "RuntimeError: nobody catches this"


def test_the_server_of_http_writes_json_too() -> None:
    lines = json_lines("-c", UVICORN)

    assert {line["logger"] for line in lines} == {"uvicorn.error"}
    assert "no engine" in [line["message"] for line in lines]


def test_a_library_with_a_handler_of_its_own_writes_each_line_once() -> None:
    [line] = json_lines("-c", LIBRARY)

    assert (line["logger"], line["message"]) == ("transformers.generation", "once only")


@pytest.mark.parametrize("module", ["service.local", "service", "trainer_worker"])
def test_a_refused_setting_is_written_in_json(module: str) -> None:
    [line] = json_lines("-m", module, TESSERA_LOG_LEVEL="LOUD")

    assert line["level"] == "ERROR"
    assert "LOUD" in line["message"]


def test_an_unknown_format_is_refused() -> None:
    assert "log_format" in stderr_of("-m", "service.local", TESSERA_LOG_FORMAT="xml")


def test_the_set_up_imports_no_torch() -> None:
    code = "import sys, tessera.processes.log_setup; print('torch' in sys.modules, file=sys.stderr)"

    assert stderr_of("-c", code).strip() == "False"
