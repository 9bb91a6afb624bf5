"""The pages that say where things are name every room, and only files that exist."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("tessera", "service", "trainer_worker")
#: What builds leave behind; folders whose names begin with a dot are passed over as well.
BUILT = frozenset({"__pycache__", "build", "dist"})
#: Pages that name files, in the order in which a newcomer reads them.
PAGES = ("README.md", "CONTRIBUTING.md", "docs/layout.md", "docs/glossary.md", "docs/figures.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def folders() -> frozenset[str]:
    """All folders of the repository with a file in them, or below them."""
    found = set()
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below if not name.startswith(".") and name not in BUILT]
        if names:
            path = Path(folder).relative_to(ROOT)
            found |= {str(each) for each in (path, *path.parents)} - {"."}
    return frozenset(found)


def named_folders() -> list[str]:
    """The folders in the first cells of the tables of `docs/layout.md`."""
    return [
        name.rstrip("/") for name in re.findall(r"^\| `([a-z_/]+/)` \|", read("docs/layout.md"), re.MULTILINE)
    ]


def test_every_room_has_a_row() -> None:
    rooms = {folder for folder in folders() if folder.split("/")[0] in PACKAGES}
    named = named_folders()

    assert {name for name in named if name.split("/")[0] in PACKAGES} == rooms
    assert len(named) == len(set(named))


def test_every_folder_beside_the_code_has_a_row() -> None:
    beside = {folder for folder in folders() if "/" not in folder and folder not in PACKAGES}

    assert {name for name in named_folders() if name.split("/")[0] not in PACKAGES} == beside


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page: str) -> None:
    files = {str(path.relative_to(ROOT)) for folder in folders() for path in (ROOT / folder).iterdir()}
    names = {Path(path).name for path in files}
    words = re.findall(
        r"`([\w./-]+)`", re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    )
    paths = [word for word in words if re.search(r"\.(py|md|json|yml|toml)$", word)]
    unknown = [path for path in paths if not ((ROOT / path).exists() or path in files or path in names)]
    rooms = [word for word in words if word.endswith("/") and not (ROOT / word).is_dir()]

    assert unknown + rooms == []


def test_every_page_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([a-z-]+\.md)\)", read("docs/README.md")))

    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
