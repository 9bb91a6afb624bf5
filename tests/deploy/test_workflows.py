"""The workflows, issue forms and pre-commit hooks: valid, and calling what the repository really has."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.waiting import HANG_S

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
HOOKS = ROOT / ".pre-commit-config.yaml"


def run_tool(tool: str, *arguments: str | Path) -> None:
    """Run a console script of this environment, and fail with what it says if it fails."""
    command = [Path(sys.executable).parent / tool, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout + done.stderr


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_workflows_and_forms_follow_githubs_schemas():
    run_tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    run_tool("check-jsonschema", "--builtin-schema", "custom.github-workflows-require-timeout", *WORKFLOWS)
    run_tool("check-jsonschema", "--builtin-schema", "vendor.github-issue-forms", *FORMS)


def test_yaml_is_clean():
    run_tool("yamllint", "--strict", "--config-file", "deploy/yamllint.yml", ".github", HOOKS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_unless_a_job_says_otherwise(path):
    workflow = load(path)

    assert workflow["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert granted == ({"publish": {"id-token": "write"}} if path.name == "release.yml" else {})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_has_a_version(path):
    for step in steps(load(path)):
        if "uses" in step:
            assert step["uses"].partition("@")[2], step


def test_ci_runs_the_script_that_developers_can_run():
    commands = [step["run"] for step in steps(load(ROOT / ".github/workflows/ci.yml")) if "run" in step]

    assert ".ci/run" in commands
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_ci_covers_the_oldest_python_that_is_supported():
    workflow = load(ROOT / ".github/workflows/ci.yml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert f">={versions[0]}" == project["requires-python"]


def test_a_release_is_published_without_a_stored_token():
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")

    assert "secrets." not in text
    assert load(ROOT / ".github/workflows/release.yml")["jobs"]["publish"]["environment"] == "release"


def test_hooks_run_the_tools_of_this_environment():
    hooks = [hook for repo in load(HOOKS)["repos"] for hook in repo["hooks"]]

    assert {repo["repo"] for repo in load(HOOKS)["repos"]} == {"local"}
    for hook in hooks:
        assert hook["language"] == "system"
        folder, tool = os.path.split(hook["entry"].split()[0])
        assert folder == ".venv/bin"
        assert (Path(sys.executable).parent / tool).is_file(), tool
