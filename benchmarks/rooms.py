"""Which room of the source imports which? Prints the graph and draws it; exit status 1 if it has a circle.

    python -m benchmarks.rooms [--root CHECKOUT] [--typing] [--svg FILE] [--json FILE]

A room is a folder of modules. The modules at the top of a package that holds rooms (TOP) stand for
themselves: `service/app.py` is no room-mate of `service/errors.py`. Imports are read from the source, also
those inside functions; those under `if TYPE_CHECKING` only with --typing.

The picture stacks the rooms in layers: every arrow points down. It leaves out an arrow where a longer way
leads to the same room.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.report import print_table, save

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tessera", "service", "trainer_worker")
#: Folders whose own modules each count as a node.
TOP = ("tessera", "tessera/cli", "tessera/methods", "service", "service/engine", "trainer_worker")

BOX_HEIGHT, ROW_HEIGHT, GAP = 26, 78, 14
CHARACTER_WIDTH = 6.6
COLOURS = {"tessera": "#e3f0e3", "service": "#e3eaf7", "trainer_worker": "#f7ecdc"}

#: Node → the nodes that it imports.
Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Rooms:
    """The rooms of a source tree."""

    #: Room, or module at the top of a package → the modules in it, `__init__` left out.
    modules: Mapping[str, Sequence[str]]
    imports: Graph

    @property
    def circles(self) -> list[list[str]]:
        """The rooms that import each other, directly or in turn: each group of them, sorted."""
        reachable = {room: _reachable(self.imports, room) for room in self.imports}
        groups = {
            frozenset({room} | {other for other in reached if room in reachable[other]})
            for room, reached in reachable.items()
            if room in reached
        }
        return sorted(sorted(group) for group in groups)

    @property
    def num_arrows(self) -> int:
        return sum(len(targets) for targets in self.imports.values())

    def to_rows(self) -> list[dict[str, Any]]:
        return [
            {
                "room": room,
                "modules": len(self.modules[room]),
                "imports": ", ".join(sorted(self.imports[room])) or "-",
            }
            for room in sorted(self.modules)
        ]


def read_rooms(root: Path, *, with_typing: bool = False) -> Rooms:
    """The rooms below `root`. with_typing: imports that only a type checker makes count, too."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }
    rooms = {name: _room(path.relative_to(root)) for name, path in paths.items()}
    modules: dict[str, list[str]] = {room: [] for room in rooms.values()}
    imports: Graph = {room: set() for room in rooms.values()}
    for name, path in paths.items():
        if path.stem != "__init__" or rooms[name].endswith("/__init__"):
            modules[rooms[name]].append(name)
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        for target in _imported(ast.parse(path.read_text()), package, set(paths), with_typing=with_typing):
            if rooms[target] != rooms[name]:
                imports[rooms[name]].add(rooms[target])
    return Rooms(modules, imports)


def _room(path: Path) -> str:
    folder = path.parent.as_posix()
    return path.with_suffix("").as_posix() if folder in TOP else folder


def _imported(tree: ast.Module, package: str, known: AbstractSet[str], *, with_typing: bool) -> Iterator[str]:
    """The modules of `known` that a module imports. package: the one that relative imports start from."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            for alias in node.names:  # a name is a module of its own, or something that the module defines
                target = f"{module}.{alias.name}"
                if target in known or module in known:
                    yield target if target in known else module
        elif isinstance(node, ast.If) and not with_typing and _is_type_checking(node.test):
            pending.extend(node.orelse)
        else:
            pending.extend(ast.iter_child_nodes(node))


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _reachable(graph: Graph, start: str) -> set[str]:
    """What can be reached from `start` over at least one arrow; `start` itself only over a circle."""
    reached: set[str] = set()
    pending = list(graph[start])
    while pending:
        node = pending.pop()
        if node not in reached:
            reached.add(node)
            pending.extend(graph[node])
    return reached


def layers_of(graph: Graph) -> list[list[str]]:
    """The nodes from those that nobody imports down, each one layer below the lowest that imports it.

    The graph has no circle.
    """
    depths: dict[str, int] = {}
    importers: Graph = {node: set() for node in graph}
    for node, targets in graph.items():
        for target in targets:
            importers[target].add(node)

    def depth(node: str) -> int:
        if node not in depths:
            depths[node] = 1 + max((depth(other) for other in importers[node]), default=-1)
        return depths[node]

    layers: list[list[str]] = [[] for _ in range(1 + max(map(depth, graph), default=-1))]
    for node in sorted(graph):
        layers[depth(node)].append(node)
    return layers


def without_shortcuts(graph: Graph) -> Graph:
    """The graph without an arrow from a to c where a longer way leads from a to c. It has no circle."""
    below = {node: _reachable(graph, node) for node in graph}
    return {
        node: {target for target in targets if not any(target in below[other] for other in targets)}
        for node, targets in graph.items()
    }


def draw(rooms: Rooms) -> str:
    """The graph as an SVG picture, one row per layer, without nodes that have no arrow. It has no circle."""
    connected = set().union(*rooms.imports.values()) | {
        room for room, targets in rooms.imports.items() if targets
    }
    arrows = without_shortcuts({room: rooms.imports[room] for room in connected})
    layers = _ordered(layers_of(arrows), arrows)
    widths = {room: CHARACTER_WIDTH * len(_label(rooms, room)) + 16 for room in connected}
    row_widths = [sum(widths[room] + GAP for room in layer) - GAP for layer in layers]
    width, height = max(row_widths) + 2 * GAP, ROW_HEIGHT * len(layers)
    places: dict[str, tuple[float, float]] = {}
    for i, (layer, row_width) in enumerate(zip(layers, row_widths, strict=True)):
        left = (width - row_width) / 2
        for room in layer:
            places[room] = left, ROW_HEIGHT * i + (ROW_HEIGHT - BOX_HEIGHT) / 2
            left += widths[room] + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        'font-family="monospace" font-size="11">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#777"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height}" fill="white"/>',
    ]
    for room, targets in sorted(arrows.items()):
        x, y = places[room][0] + widths[room] / 2, places[room][1] + BOX_HEIGHT
        for target in sorted(targets):
            to_x, to_y = places[target][0] + widths[target] / 2, places[target][1]
            middle = (y + to_y) / 2
            lines.append(
                f'<path d="M{x:.0f},{y:.0f} C{x:.0f},{middle:.0f} '
                f'{to_x:.0f},{middle:.0f} {to_x:.0f},{to_y:.0f}" '
                'fill="none" stroke="#999" marker-end="url(#tip)"/>'
            )
    for room, (left, top) in places.items():
        colour = COLOURS[room.partition("/")[0]]
        lines.append(
            f'<rect x="{left:.0f}" y="{top:.0f}" width="{widths[room]:.0f}" height="{BOX_HEIGHT}" rx="4" '
            f'fill="{colour}" stroke="#666"/>'
            f'<text x="{left + widths[room] / 2:.0f}" y="{top + BOX_HEIGHT / 2 + 4:.0f}" '
            f'text-anchor="middle">{escape(_label(rooms, room))}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def _label(rooms: Rooms, room: str) -> str:
    """A room with the number of its modules; a module of its own with its name alone."""
    is_module = room.endswith("/__init__") or rooms.modules[room] == [room.replace("/", ".")]
    return f"{room}.py" if is_module else f"{room} ({len(rooms.modules[room])})"


def _ordered(layers: Sequence[Sequence[str]], arrows: Graph) -> list[list[str]]:
    """Each layer in the order of the mean place of those above that import its rooms: fewer arrows cross."""
    importers: Graph = {node: set() for node in arrows}
    for node, targets in arrows.items():
        for target in targets:
            importers[target].add(node)
    places: dict[str, float] = {}
    ordered = []
    for layer in layers:
        means = {
            node: sum(places[other] for other in importers[node]) / len(importers[node])
            if importers[node]
            else 0.5
            for node in layer
        }
        row = sorted(layer, key=lambda node: (means[node], node))
        places |= {node: (i + 1) / (len(row) + 1) for i, node in enumerate(row)}
        ordered.append(row)
    return ordered


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose source is read")
    parser.add_argument("--typing", action="store_true", help="count imports under TYPE_CHECKING, too")
    parser.add_argument("--svg", type=Path, help="draw the graph into this file")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rooms = read_rooms(arguments.root, with_typing=arguments.typing)
    rows = rooms.to_rows()
    print_table(rows)
    num_modules = sum(map(len, rooms.modules.values()))
    print(f"\n{num_modules} modules in {len(rows)} rooms and single modules, {rooms.num_arrows} arrows")
    for circle in rooms.circles:
        print(f"circle: {', '.join(circle)}")
    if arguments.svg is not None and not rooms.circles:
        arguments.svg.write_text(draw(rooms))
    save(arguments.json, question=__doc__.splitlines()[0], arguments=vars(arguments), rows=rows)
    return 1 if rooms.circles else 0


if __name__ == "__main__":
    sys.exit(main())
