"""Who waits to be admitted, fair between tenants.

Each tenant has a line of its own. Turns go round the tenants, so that one with a thousand requests delays
another's only request by one turn. Requests whose adapter or basis is not there yet are parked beside the
lines: they hold nobody up, and join their tenant's line when it has come.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from adapter_core.adapter import AdapterRef
from service.engine.sequence import Sequence


class WaitingLine:
    """Sequences that are not running: in line by tenant, or parked by adapter."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, OrderedDict[str, Sequence]] = OrderedDict()  # in order of turns
        self._parked: dict[AdapterRef, dict[str, Sequence]] = {}
        self.num_parked = 0
        self.num_in_line = 0

    def __len__(self) -> int:
        return self.num_in_line + self.num_parked

    def __iter__(self) -> Iterator[Sequence]:
        for group in (*self._lines.values(), *self._parked.values()):
            yield from group.values()

    def append(self, sequence: Sequence) -> None:
        """To the end of its tenant's line."""
        self._lines.setdefault(sequence.tenant, OrderedDict())[sequence.request_id] = sequence
        self.num_in_line += 1

    def push_front(self, sequence: Sequence) -> None:
        """To the front of its tenant's line: it was running already."""
        self.append(sequence)
        self._lines[sequence.tenant].move_to_end(sequence.request_id, last=False)

    def in_turn(self) -> Iterator[Sequence]:
        """Who is in line, one of each tenant, then again; as it is now, whatever is taken meanwhile."""
        lines = deque(iter(list(line.values())) for line in self._lines.values())
        while lines:
            line = lines.popleft()
            sequence = next(line, None)
            if sequence is not None:
                yield sequence
                lines.append(line)

    def take(self, sequence: Sequence) -> None:
        """Out of the line to run; its tenant has had its turn."""
        self._remove_from_line(sequence)
        if sequence.tenant in self._lines:
            self._lines.move_to_end(sequence.tenant)

    def park(self, sequence: Sequence, ref: AdapterRef) -> None:
        """Beside the lines, until `wake(ref)`."""
        if self._is_in_line(sequence):
            self._remove_from_line(sequence)
        self._parked.setdefault(ref, {})[sequence.request_id] = sequence
        self.num_parked += 1

    def wake(self, ref: AdapterRef) -> None:
        for sequence in self._unpark(ref):
            self.append(sequence)

    def parked(self, ref: AdapterRef) -> list[Sequence]:
        return list(self._parked.get(ref, {}).values())

    def parked_refs(self, basis_id: str) -> list[AdapterRef]:
        """The adapters of one basis that parked requests wait for."""
        return [ref for ref in self._parked if ref.basis_id == basis_id]

    def remove(self, sequence: Sequence) -> None:
        """Out of wherever it waits: it has ended."""
        if self._is_in_line(sequence):
            self._remove_from_line(sequence)
            return
        ref = sequence.adapter
        assert ref is not None
        del self._parked[ref][sequence.request_id]
        self.num_parked -= 1
        if not self._parked[ref]:
            del self._parked[ref]

    def check_integrity(self) -> None:
        assert self.num_in_line == sum(len(line) for line in self._lines.values())
        assert self.num_parked == sum(len(group) for group in self._parked.values())
        assert all(self._lines.values())
        assert all(self._parked.values())

    def _is_in_line(self, sequence: Sequence) -> bool:
        return sequence.request_id in self._lines.get(sequence.tenant, {})

    def _remove_from_line(self, sequence: Sequence) -> None:
        line = self._lines[sequence.tenant]
        del line[sequence.request_id]
        self.num_in_line -= 1
        if not line:
            del self._lines[sequence.tenant]

    def _unpark(self, ref: AdapterRef) -> list[Sequence]:
        group = list(self._parked.pop(ref, {}).values())
        self.num_parked -= len(group)
        return group
