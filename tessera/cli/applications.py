"""Finding the applications of the repository, and starting them.

The package contains only the library. The service, the trainer worker and the demo are applications of the
repository, which are there if a checkout is installed (`pip install -e`) or an image contains them. They are
started by name and replace this process, so nothing of them is imported here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import NoReturn

from tessera.errors import TesseraError

DISTRIBUTION = "tessera-adapters"
#: A directory that contains all these folders contains the applications.
_FOLDERS = ("service", "trainer_worker")


class ApplicationMissing(TesseraError):
    """The application that a command starts is not part of this installation."""

    code = "application_missing"


def find_root() -> Path | None:
    """Return the folder of the applications, or None if only the library is installed."""
    for entry in sys.path:
        root = Path(entry).absolute()
        if all((root / name / "__main__.py").is_file() for name in _FOLDERS):
            return root
    return None


def run(command: str, module: str, arguments: list[str], settings: Mapping[str, str | None]) -> NoReturn:
    """Replace this process by `python -m <module> <arguments>`.

    command: what the user typed, for messages. settings: environment variables to set; None leaves one as it
    is. Raises `ApplicationMissing` if the module or a package that it needs is not installed.
    """
    root = require_root(command, module)
    chosen = {name: value for name, value in settings.items() if value is not None}
    environment = {**os.environ, **chosen, **import_path(root)}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)


def resolve_model(name: str) -> str:
    """Return the value of TESSERA_BASE_MODEL for a name given to --model.

    In a checkout, `examples/base_models.py` resolves the repository's own names (`smollm2`), and may fetch a
    model. If it fails it prints the reason, and this process ends. Elsewhere `name` already is a directory or
    a hub id.
    """
    root = find_root()
    if root is None or not (root / "examples" / "base_models.py").is_file():
        return name
    done = subprocess.run(
        [sys.executable, "-m", "examples.base_models", name],
        env={**os.environ, **import_path(root)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(done.returncode)
    return done.stdout.strip()


def require_root(command: str, module: str) -> Path:
    """Return the folder from which `module` can be run. Raises `ApplicationMissing`."""
    root = find_root()
    if root is None or not _is_module(root, module):
        raise ApplicationMissing(
            f"`{command}` runs an application of Tessera's repository, which is not in this installation "
            f"(the package contains only the library): clone {repository_url()} and run `make serve` in it, "
            "or install the clone with `pip install -e '.[service,embedded]'`"
        )
    if missing := missing_requirements():
        raise ApplicationMissing(
            f"`{command}` needs packages that are not installed ({', '.join(missing)}): "
            f"run `pip install -e '.[service,embedded]'` in {root}"
        )
    return root


def import_path(root: Path) -> dict[str, str]:
    """Return the variables that make a Python process import the applications from `root`.

    It then imports nothing from its working directory, which may contain another `service` folder.
    """
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def missing_requirements() -> list[str]:
    """Return the packages of the extra `service` that are not installed."""
    try:
        required = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # run from a checkout that was never installed
        return []
    names = [
        re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        for requirement in required
        if re.search(r"""extra == ['"]service['"]""", requirement) and "win32" not in requirement
    ]
    return [name for name in names if not _is_installed(name)]


def repository_url() -> str:
    """Return the URL of the repository, which the package's metadata contain."""
    try:
        urls = metadata(DISTRIBUTION).get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    labelled: dict[str, str] = dict(url.split(", ", 1) for url in urls)
    return labelled.get("Repository", "the repository")


def _is_module(root: Path, module: str) -> bool:
    path = root.joinpath(*module.split("."))
    return (path / "__main__.py").is_file() or path.with_suffix(".py").is_file()


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
