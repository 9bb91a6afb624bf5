"""`tessera` and its commands: what their help says, what they start, and with which settings."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from service.engine.settings import EngineSettings
from service.local import is_ready
from service.settings import ServiceSettings
from tessera.cli.app import app
from tessera.cli.applications import import_path
from tessera.processes.child_process import start_child
from tessera.settings import CommonSettings, variable_of
from tests.conftest import free_ports
from tests.tessera.cli.commands import ROOT, tessera
from tests.waiting import HANG_S, wait_until_sync
from trainer_worker.settings import WorkerSettings

COMMANDS = ("serve", "worker", "demo", "doctor", "version")
MODULES = {
    "service": (ServiceSettings, EngineSettings, CommonSettings),
    "service.local": (CommonSettings,),
    "service.engine": (),
    "trainer_worker": (WorkerSettings, CommonSettings),
}

#: Says what it was started with.
ECHO = """
import json, os, sys
chosen = {name: value for name, value in os.environ.items() if name.startswith("TESSERA_")}
print(json.dumps({"module": __spec__.name, "arguments": sys.argv[1:], "settings": chosen}))
"""


@pytest.fixture
def echoes(tmp_path: Path) -> Path:
    """A folder that looks like a checkout, whose applications only say what they were started with."""
    for path in ("service/__main__.py", "service/local.py", "trainer_worker/__main__.py", "examples/demo.py"):
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(ECHO)
    for package in ("service", "trainer_worker"):
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


def test_the_commands_are_those_of_the_help():
    done = tessera("--help")

    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^\W*{name}\s", done.stdout, re.MULTILINE) for name in COMMANDS)
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_starts_nothing(command, echoes):
    done = tessera(command, "--help", first_on_path=echoes)

    assert done.returncode == 0, done.stderr
    assert f"Usage: tessera {command}" in done.stdout
    assert '"module"' not in done.stdout


def test_without_a_command_there_is_help():
    assert "Usage: tessera" in tessera().stdout


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["serve", "--help"], ["doctor", "--help"]])
def test_quick_commands_do_not_import_what_takes_seconds(arguments):
    program = (
        "import sys\n"
        "from tessera.cli import main\n"
        f"sys.argv = ['tessera', *{arguments}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'redis', 'tessera.settings'} & set(sys.modules)\n"
        "    print(end.code, sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)

    assert done.stderr.splitlines()[-1] == "0 []"


def test_version_names_what_tessera_is_built_on():
    done = tessera("version")

    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "tessera",
        "torch",
        "transformers",
        "python",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve"], {"module": "service.local", "arguments": [], "settings": {}}),
        (
            ["serve", "--host", "0.0.0.0", "--port", "8123", "--model", "org/name", "--workers", "2"],
            {
                "module": "service.local",
                "arguments": [],
                "settings": {
                    "TESSERA_SERVICE_HOST": "0.0.0.0",
                    "TESSERA_SERVICE_PORT": "8123",
                    "TESSERA_BASE_MODEL": "org/name",
                    "TESSERA_SERVICE_WORKERS": "2",
                },
            },
        ),
        (
            ["worker", "--data-dir", "/srv/data", "--store-url", "redis://store"],
            {
                "module": "trainer_worker.__main__",
                "arguments": [],
                "settings": {"TESSERA_DATA_DIR": "/srv/data", "TESSERA_STORE_URL": "redis://store"},
            },
        ),
        (
            ["demo", "--model", "smollm2", "--report", "figures.json"],
            {
                "module": "examples.demo",
                "arguments": ["--model=smollm2", "--report=figures.json"],
                "settings": {},
            },
        ),
    ],
)
def test_a_command_becomes_its_application_with_the_settings_given(arguments, expected, echoes):
    done = tessera(*arguments, first_on_path=echoes)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_options_go_before_the_environment_and_leave_the_rest_of_it():
    environment = {"TESSERA_SERVICE_PORT": "1", "TESSERA_RANK": "8"}
    program = (
        "import os\n"
        "from tessera.cli import applications\n"
        "os.execve = lambda path, command, environment: print(\n"
        "    environment['TESSERA_SERVICE_PORT'], environment['TESSERA_RANK'], command[1:])\n"
        "settings = {'TESSERA_SERVICE_PORT': '8123', 'TESSERA_DATA_DIR': None}\n"
        "applications.run('tessera serve', 'service.local', [], settings)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**environment}, cwd=ROOT, capture_output=True, text=True
    )

    assert done.stdout.strip() == "8123 8 ['-m', 'service.local']"


def test_a_folder_of_the_same_name_where_one_stands_is_not_run(echoes, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "service").mkdir()
    (elsewhere / "service" / "local.py").write_text("raise SystemExit('the wrong one')")

    done = tessera("serve", folder=elsewhere, first_on_path=echoes)

    assert json.loads(done.stdout)["module"] == "service.local"


@pytest.mark.parametrize(
    ("option", "value"), [("--port", "0"), ("--port", "70000"), ("--workers", "0"), ("--prot", "1")]
)
def test_an_option_out_of_range_or_unknown_is_refused(option, value, echoes):
    done = tessera("serve", option, value, first_on_path=echoes)

    assert done.returncode == 2
    assert option in done.stderr


@pytest.mark.parametrize("command", ["serve", "worker", "doctor"])
def test_every_option_names_its_setting_and_the_default_of_that(command):
    known = {
        variable_of(cls, name): field.default
        for cls in (CommonSettings, ServiceSettings)
        for name, field in cls.model_fields.items()
    }
    parameters = typer.main.get_command(app).commands[command].params
    named = {}
    for parameter in parameters:
        found = re.search(r"\((TESSERA_\w+), default (.+)\)\.$", getattr(parameter, "help", None) or "")
        if found:
            named[parameter.name] = (found[1], found[2])

    assert len(named) == len([p for p in parameters if p.name not in ("as_json", "help")])
    for variable, default in named.values():
        assert variable in known
        if not default.startswith(("the ", "an ")):
            assert default == str(known[variable])


@pytest.mark.parametrize(("module", "settings"), MODULES.items())
def test_help_of_a_module_lists_its_settings_and_starts_nothing(module, settings):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S
    )

    assert done.returncode == 0, done.stderr
    assert f"python -m {module}" in done.stdout.splitlines()[0]
    for cls in settings:
        for name in cls.model_fields:
            assert f"  {variable_of(cls, name)}\n" in done.stdout


def test_a_module_takes_no_arguments():
    done = subprocess.run(
        [sys.executable, "-m", "service.local", "--port=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )

    assert done.returncode == 2
    assert "--port=1" in done.stderr


def test_serve_answers_and_ends_in_order_wherever_it_is_started(tmp_path):
    (port,) = free_ports(1)
    log = tmp_path / "serve.log"
    options = ["--port", str(port), "--data-dir", str(tmp_path / "data"), "--model", "tiny"]
    command = [sys.executable, "-P", "-m", "tessera.cli", "serve", *options]
    with log.open("wb") as output:
        process = start_child(
            ["/usr/bin/env", "--chdir", str(tmp_path), *command],
            environment={**os.environ, **import_path(ROOT), "TESSERA_WORKER_METRICS_PORT": "0"},
            output=output,
        )

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-2000:]
        return is_ready(f"http://127.0.0.1:{port}")

    try:
        wait_until_sync(answers)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_S) == 0, log.read_text()[-2000:]
