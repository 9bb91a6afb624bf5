"""The graph of rooms: what is read from the source, and what must hold for this repository."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.rooms import ROOT, draw, layers_of, read_rooms, without_shortcuts

#: Of one room. A folder with more is hard to take in.
MAX_MODULES = 17


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """`service/app.py` → `service/http` → `tessera/model`; only a type checker sees the way back."""
    write(tmp_path, "service/__init__.py", "")
    write(
        tmp_path,
        "service/app.py",
        "def run():\n    from service.http import routes\n    import tessera.model.base\n",
    )
    write(tmp_path, "service/http/__init__.py", "")
    write(tmp_path, "service/http/routes.py", "from .answers import Answer\nfrom tessera.model import base\n")
    write(tmp_path, "service/http/answers.py", "import json\n")
    write(tmp_path, "tessera/model/__init__.py", "")
    write(
        tmp_path,
        "tessera/model/base.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from service.http.answers import Answer\n",
    )
    return tmp_path


def write(root: Path, path: str, source: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(source)


def test_rooms_are_folders_and_the_modules_at_the_top(tree: Path) -> None:
    rooms = read_rooms(tree)

    assert rooms.modules == {
        "service/__init__": ["service"],
        "service/app": ["service.app"],
        "service/http": ["service.http.answers", "service.http.routes"],
        "tessera/model": ["tessera.model.base"],
    }
    assert rooms.imports == {
        "service/__init__": set(),
        "service/app": {"service/http", "tessera/model"},
        "service/http": {"tessera/model"},
        "tessera/model": set(),
    }
    assert rooms.circles == []


def test_imports_of_the_type_checker_count_on_demand(tree: Path) -> None:
    assert read_rooms(tree, with_typing=True).circles == [["service/http", "tessera/model"]]


def test_a_package_that_imports_from_its_own_room_makes_no_circle(tree: Path) -> None:
    write(tree, "service/http/__init__.py", "from service.http.routes import run\n")

    assert read_rooms(tree).circles == []


def test_a_relative_import_may_climb(tree: Path) -> None:
    write(tree, "tessera/model/base.py", "from .. import settings\n")
    write(tree, "tessera/settings.py", "")

    assert read_rooms(tree).imports["tessera/model"] == {"tessera/settings"}


def test_the_picture_points_down_and_leaves_out_shortcuts(tree: Path) -> None:
    rooms = read_rooms(tree)

    assert layers_of(rooms.imports) == [
        ["service/__init__", "service/app"],
        ["service/http"],
        ["tessera/model"],
    ]
    assert without_shortcuts(rooms.imports)["service/app"] == {"service/http"}
    texts = [
        text.text for text in ElementTree.fromstring(draw(rooms)).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert sorted(filter(None, texts)) == ["service/app.py", "service/http (2)", "tessera/model (1)"]


def test_this_repository_has_no_circle_and_no_crowded_room() -> None:
    rooms = read_rooms(ROOT)

    assert rooms.circles == []
    assert {room: len(names) for room, names in rooms.modules.items() if len(names) > MAX_MODULES} == {}
    assert "service/engine/scheduling" in rooms.modules
