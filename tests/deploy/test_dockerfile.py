"""deploy/Dockerfile and what surrounds it: no Docker engine is needed to see that its parts fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.split_requirements import split_requirements
from tests.waiting import HANG_S

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(keyword, arguments) of each instruction, continuation lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def stages(instructions: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage by its name, those of its parent stage first."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for keyword, arguments in instructions:
        if keyword == "FROM":
            parent, _, name = arguments.partition(" AS ")
            found[name] = list(found.get(parent, []))
        elif name:
            found[name].append((keyword, arguments))
    return found


def test_hadolint_has_nothing_to_say():
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", DOCKERFILE], capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


def test_the_base_image_is_pinned_to_a_python_that_the_constraints_were_tested_with(instructions):
    (image,) = {a for k, a in instructions if k == "ARG" and a.startswith("PYTHON_IMAGE=")}
    tag = image.partition(":")[2]
    assert re.fullmatch(r"3\.11\.\d+-slim-bookworm", tag)
    assert all(a.startswith(("${PYTHON_IMAGE}", "runtime")) for k, a in instructions if k == "FROM")


def test_whoever_builds_chooses_the_package_index(instructions):
    (default,) = {a for k, a in instructions if k == "ARG" and a.startswith("TORCH_INDEX_URL=")}
    assert default == 'TORCH_INDEX_URL=""'
    assert "://" not in DOCKERFILE.read_text()


def test_both_images_run_without_root_and_without_a_shell(instructions):
    for name, module in (("service", "service"), ("trainer", "trainer_worker")):
        stage = dict(stages(instructions)[name])  # the last of each keyword wins, as in Docker
        assert stage["USER"] == "10001:10001"
        assert json.loads(stage["ENTRYPOINT"]) == ["python", "-m", module]
        assert "CMD" not in stage


def test_what_is_copied_exists_and_passes_the_ignore_file(instructions):
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "everything is left out unless it is named"
    admitted = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = set()
    for keyword, arguments in instructions:
        if keyword == "COPY" and "--from" not in arguments:
            copied |= set(arguments.split()[:-1])
    assert copied == admitted
    for path in copied:
        assert (ROOT / path).exists(), path


def test_every_package_of_the_distribution_is_copied(instructions):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    copied = {a.split()[0] for k, a in instructions if k == "COPY"}
    assert set(packages) <= copied


def test_both_applications_are_where_python_looks_for_them(instructions):
    (variables,) = [a for k, a in stages(instructions)["runtime"] if k == "ENV"]
    folder = dict(pair.split("=", 1) for pair in variables.split())["PYTHONPATH"]
    copied = dict(
        a.split() for k, a in stages(instructions)["builder"] if k == "COPY" and len(a.split()) == 2
    )
    assert folder.startswith("/opt/tessera/"), "what the runtime stage takes over from the builder"
    for name in ("service", "trainer_worker"):
        assert copied[name] == f"{folder}/{name}"


def test_requirements_are_split_into_layers(tmp_path):
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    split_requirements(tmp_path)
    assert re.fullmatch(r"torch==[\d.]+\n", (tmp_path / "torch.txt").read_text())
    assert re.fullmatch(r"pip==[\d.]+\n", (tmp_path / "pip.txt").read_text())
    requirements = (tmp_path / "requirements.txt").read_text().splitlines()
    assert "redis[hiredis]>=6.4" in requirements
    assert "fastapi>=0.120" in requirements
    constraints = (tmp_path / "constraints.txt").read_text().lower().replace("_", "-")
    for requirement in requirements:
        name = re.match(r"[\w-]+", requirement)[0]
        assert f"\n{name.lower()}==" in constraints, f"{name}: constraints.txt does not pin it"


@contextmanager
def http_server(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server that answers every GET with `status`: its port and the paths it was asked for."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("stage", "port", "path"), [("service", 8000, "/health/ready"), ("trainer", 9100, "/health")]
)
def test_the_health_check_follows_the_status(instructions, stage, port, path):
    check = dict(stages(instructions)[stage])["HEALTHCHECK"]
    command = json.loads(check.partition(" CMD ")[2])
    assert command[:2] == ["python", "-c"]
    assert str(port) in command[2]
    for status, code in ((200, 0), (503, 1)):
        with http_server(status) as (test_port, asked):
            program = command[2].replace(str(port), str(test_port))
            environment = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
            done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=HANG_S)
        assert (done.returncode, asked) == (code, [path])
