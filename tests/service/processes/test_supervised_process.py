"""Supervised processes: restarted when they die, and the address that several of them share."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from service.processes.api_workers import listen
from service.processes.supervised_process import FIRST_BACKOFF_S, SupervisedProcess
from service.settings import ServiceSettings
from tessera.errors import InvalidInput
from tests.waiting import HANG_S, has_ended, wait_until_sync

SLEEPS = "import time; time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}"


@pytest.fixture
def child_of() -> Iterator[Callable[..., SupervisedProcess]]:
    """Makes a child that runs a program, not started yet; the child is stopped after the test."""
    made: list[SupervisedProcess] = []

    def make(program: str, **options: object) -> SupervisedProcess:
        child = SupervisedProcess("test", [sys.executable, "-c", program], {}, **options)  # type: ignore[arg-type]
        made.append(child)
        return child

    yield make
    for child in made:
        child.stop(timeout_s=0.1)


def test_a_child_that_dies_is_restarted_and_its_death_reported(
    child_of: Callable[..., SupervisedProcess],
) -> None:
    deaths: list[int] = []
    child = child_of(SLEEPS, on_death=deaths.append)
    child.supervise()
    assert child.process is not None
    first = child.process.pid
    child.process.kill()

    def runs_again() -> bool:
        child.supervise()
        return child.process is not None and child.process.pid != first

    wait_until_sync(runs_again)
    assert deaths == [first]


def test_a_child_that_keeps_dying_is_started_ever_more_slowly(
    child_of: Callable[..., SupervisedProcess],
) -> None:
    child = child_of("raise SystemExit(3)")
    waits = []
    for _ in range(3):
        child.start_after = 0.0
        child.supervise()
        assert child.process is not None
        child.process.wait(HANG_S)
        child.supervise()
        assert child.process is None
        waits.append(child.start_after - time.monotonic())
    assert child.delay.after(0.0) == 8 * FIRST_BACKOFF_S
    assert waits == sorted(waits)


def test_a_child_that_does_not_end_is_killed(child_of: Callable[..., SupervisedProcess]) -> None:
    child = child_of(DEAF)
    child.supervise()
    assert child.process is not None
    child.stop(timeout_s=0.5)
    assert has_ended(child.process.pid)
    child.stop(timeout_s=0.5)  # again: nothing happens


def test_an_address_that_is_taken_is_refused_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput, match=f"127.0.0.1, port {port}"):
            listen(ServiceSettings(port=port))
    with listen(ServiceSettings(port=0)) as listener:
        assert listener.getsockname()[1] > 0
