"""Split what Tessera needs into files that an image can install as layers of their own.

Reads pyproject.toml and constraints.txt of the working directory; writes pip.txt and torch.txt (exactly the
version tested) and requirements.txt (what else the library and the applications need, to be installed with
the constraints).
"""

from __future__ import annotations

import tomllib
from pathlib import Path


def pinned(package: str, constraints: str) -> str:
    """The line of `constraints` that pins `package`."""
    return next(line for line in constraints.splitlines() if line.startswith(f"{package}=="))


def split_requirements(directory: Path) -> None:
    constraints = (directory / "constraints.txt").read_text()
    project = tomllib.loads((directory / "pyproject.toml").read_text())["project"]
    for package in ("pip", "torch"):
        (directory / f"{package}.txt").write_text(pinned(package, constraints) + "\n")
    requirements = [*project["dependencies"], *project["optional-dependencies"]["service"]]
    (directory / "requirements.txt").write_text("\n".join(requirements) + "\n")


if __name__ == "__main__":
    split_requirements(Path())
