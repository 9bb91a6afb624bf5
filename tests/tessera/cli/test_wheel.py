"""The wheel: what is in it, and what it can do where nothing of the repository is."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.tessera.cli.commands import ROOT
from tests.waiting import HANG_S

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = "import sys, hatchling.build as build; print(getattr(build, sys.argv[1])(sys.argv[2]))"


def build(kind: str, folder: Path) -> Path:
    """Let the build backend make a distribution of this checkout, without a network."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder into which pip has installed the wheel."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    options = ["--no-index", "--no-deps", "--no-compile", "--target", str(target)]
    done = subprocess.run(
        [*pip, "install", *options, str(wheel)], capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run(installed: Path, *command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with the installed package and this environment's dependencies, but without the checkout.

    -S: the environment's .pth file, which names the checkout, is not read.
    """
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(installed), sysconfig.get_path("purelib"), *inherited]
    without_checkout = [entry for entry in path if entry and not (Path(entry) / "service").exists()]
    return subprocess.run(
        [sys.executable, "-S", *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(without_checkout), "COLUMNS": "400"},
        cwd=folder or installed,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


def tessera(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The console script that pip has written."""
    return run(installed, str(installed / "bin" / "tessera"), *arguments)


def test_only_the_library_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()

    tops = {name.split("/")[0] for name in names}
    assert tops == {"tessera", f"tessera_adapters-{PROJECT['version']}.dist-info"}
    assert "tessera/py.typed" in names
    files = {path for path in (ROOT / "tessera").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {name for name in names if name.startswith("tessera/")} == {
        str(path.relative_to(ROOT)) for path in files
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_metadata_says_what_it_is_and_where_it_comes_from(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()

    assert "tessera = tessera.cli:main" in entry_points
    assert metadata["Name"] == PROJECT["name"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert f"Repository, {PROJECT['urls']['Repository']}" in metadata.get_all("Project-URL")
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in required if line.startswith(("fastapi", "uvicorn"))]


def test_an_editable_installation_finds_the_whole_checkout(tmp_path):
    wheel = build("build_editable", tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        (links,) = [name for name in archive.namelist() if name.endswith(".pth")]
        assert set(archive.read(links).decode().split()) == {str(ROOT)}


def test_the_source_distribution_holds_the_library_and_what_builds_it(tmp_path):
    import tarfile

    with tarfile.open(build("build_sdist", tmp_path)) as archive:
        tops = {name.split("/")[1] for name in archive.getnames()}

    assert tops <= {
        "tessera", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO", ".gitignore"
    }  # fmt: skip
    assert {"tessera", "pyproject.toml", "README.md", "LICENSE"} <= tops


def test_the_command_is_installed(installed):
    helped, version = tessera(installed, "--help"), tessera(installed, "version")

    assert helped.returncode == 0, helped.stderr
    assert "Usage: tessera" in helped.stdout
    assert version.returncode == 0, version.stderr
    assert version.stdout.splitlines()[0] == f"tessera {PROJECT['version']}"


def test_the_front_door_opens(installed):
    program = (
        "import sys, tessera\n"
        "assert 'torch' not in sys.modules\n"
        "print(tessera.__file__, tessera.__version__, tessera.build_basis.__module__)\n"
    )
    done = run(installed, "-c", program)

    assert done.returncode == 0, done.stderr
    path, version, module = done.stdout.split()
    assert Path(path).is_relative_to(installed)
    assert (version, module) == (PROJECT["version"], "tessera.methods.bases")


@pytest.mark.parametrize("command", ["serve", "worker", "demo"])
def test_what_only_the_repository_has_is_a_sentence_that_says_where_to_get_it(installed, command):
    done = tessera(installed, command)

    assert done.returncode == 2
    assert done.stdout == ""
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith(f"`tessera {command}` ")
    for part in (PROJECT["urls"]["Repository"], "make serve", "pip install -e '.[service,embedded]'"):
        assert part in sentence


def test_doctor_says_what_the_library_alone_lacks(installed):
    done = tessera(installed, "doctor")

    assert done.returncode == 1
    assert "only the library is installed" in done.stdout
    assert "TESSERA_BASE_MODEL is unset" in done.stdout
    assert PROJECT["urls"]["Repository"] in done.stdout


def test_the_bundled_model_that_is_not_in_the_wheel_explains_itself(installed):
    program = (
        "from tessera import load_base_model\n"
        "from tessera.defaults import BUNDLED_MODEL\n"
        "load_base_model(BUNDLED_MODEL)\n"
    )
    done = run(installed, "-c", program)

    assert "UnsupportedModel: the bundled model is in the repository" in done.stderr
