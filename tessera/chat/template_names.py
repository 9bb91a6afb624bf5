"""Finding the names that a chat template reads without having set them, so that a caller can set them.

`jinja2.meta.find_undeclared_variables` also lists names that are set on every path before they are read, so
it cannot be used. This module knows nothing of messages and tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from jinja2 import nodes


def names_read(template: nodes.Template) -> frozenset[str]:
    """Return the names that some path through the template reads before it sets them."""
    reader = _Reader()
    reader.visit_all(template.body, frozenset())
    return frozenset(reader.read)


class _Reader:
    """Walks through a template in the order in which it runs."""

    def __init__(self) -> None:
        #: Names that were read before they were set.
        self.read: set[str] = set()

    def visit_all(self, items: Iterable[nodes.Node | None], known: frozenset[str]) -> frozenset[str]:
        """Visit the items; return the names certainly set after them if `known` are set before."""
        for item in items:
            known = known if item is None else self._visit(item, known)
        return known

    def _visit(self, node: nodes.Node, known: frozenset[str]) -> frozenset[str]:
        if isinstance(node, nodes.Name):
            self.read |= {node.name} - known if node.ctx == "load" else set()
        elif isinstance(node, nodes.NSRef):
            self.read |= {node.name} - known
        elif isinstance(node, nodes.Assign | nodes.AssignBlock):
            inner = [node.node] if isinstance(node, nodes.Assign) else [node.filter, *node.body]
            self.visit_all(inner, known)
            return self.visit_all([node.target], known) | _set_by(node.target)
        elif isinstance(node, nodes.If):
            return self._visit_branches(node, known)
        elif isinstance(node, nodes.For):
            self._visit(node.iter, known)
            inside = known | _set_by(node.target) | {"loop"}
            self.visit_all([node.test, *node.body], inside)
            self.visit_all(node.else_, known)
        elif isinstance(node, nodes.Macro | nodes.CallBlock):
            call = [node.call] if isinstance(node, nodes.CallBlock) else []
            self.visit_all([*call, *node.defaults], known)
            given = {"caller", "varargs", "kwargs", *(arg.name for arg in node.args)}
            self.visit_all(node.body, known | given)
            return known | ({node.name} if isinstance(node, nodes.Macro) else set())
        elif isinstance(node, nodes.With):
            self.visit_all(node.values, known)
            self.visit_all(node.body, known.union(*map(_set_by, node.targets)))
        else:
            inside = self.visit_all(node.iter_child_nodes(), known)
            return inside if isinstance(node, nodes.Output) else known
        return known

    def _visit_branches(self, node: nodes.If, known: frozenset[str]) -> frozenset[str]:
        self._visit(node.test, known)
        ends = [self.visit_all(node.body, known)]
        for other in node.elif_:
            self._visit(other.test, known)
            ends.append(self.visit_all(other.body, known))
        return frozenset.intersection(*ends, self.visit_all(node.else_, known))


def _set_by(target: nodes.Node) -> frozenset[str]:
    """Return the names that an assignment to `target` sets."""
    names = [target] if isinstance(target, nodes.Name) else target.find_all(nodes.Name)
    return frozenset(name.name for name in names)
