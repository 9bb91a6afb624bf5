"""The client and its supervision, against processes that start quickly and misbehave in chosen ways."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from service.engine.client.engine_child import (
    ANSWER_S,
    CHECK_INTERVAL_S,
    MAX_SOCKET_PATH_BYTES,
    Heartbeat,
    socket_path,
)
from service.engine.client.engine_client import EngineClient
from service.engine.settings import EngineSettings, to_environment
from service.engine.wire.messages import GenerationRequest, SamplingParams, TokenOutput
from tessera.errors import EngineUnavailable, InvalidInput
from tessera.processes.child_process import start_child
from tessera.processes.restarts import RestartDelay
from tessera.settings import CommonSettings
from tests.waiting import HANG_S, wait_until

STRANGE_ENGINE = Path(__file__).with_name("strange_engine.py")


@pytest.fixture
def client_of(tmp_path: Path) -> Callable[..., EngineClient]:
    """Make a client of a strange engine that has not been started yet."""

    def make(behaviour: str, *, heartbeat_timeout_s: float = 30.0) -> EngineClient:
        return EngineClient(
            CommonSettings(data_dir=tmp_path),
            "unix:///nowhere",
            engine_settings=EngineSettings(heartbeat_timeout_s=heartbeat_timeout_s),
            command=[sys.executable, str(STRANGE_ENGINE), behaviour],
        )

    return make


@asynccontextmanager
async def running(client: EngineClient) -> AsyncIterator[EngineClient]:
    await client.start()
    try:
        yield client
    finally:
        await client.close()


def request(request_id: str = "r", first_token: int = 5) -> GenerationRequest:
    return GenerationRequest(request_id, "default", [first_token, 2], SamplingParams())


async def collect(client: EngineClient, request: GenerationRequest) -> list[TokenOutput]:
    return [output async for output in client.generate(request)]


def children() -> list[psutil.Process]:
    """The engines that this process has started. Zombies, also those of other tests, have no command line."""
    started = psutil.Process().children()
    return [p for p in started if str(STRANGE_ENGINE) in (p.as_dict(["cmdline"])["cmdline"] or ())]


async def test_before_the_start_there_is_no_engine(client_of: Callable[..., EngineClient]) -> None:
    client = client_of("answers")

    assert not client.is_ready
    assert client.stats is None
    assert client.starting_error == "the engine has not been started"
    with pytest.raises(EngineUnavailable, match="starting"):
        _ = client.info
    with pytest.raises(EngineUnavailable):
        await collect(client, request())
    await client.unload("default", "tone")
    await client.close()


async def test_generates_and_ends_with_a_finish_reason(client_of: Callable[..., EngineClient]) -> None:
    async with running(client_of("answers")) as client:
        info = await client.wait_ready(HANG_S)
        outputs = await collect(client, request())

    assert info.model_name == "strange"
    assert [token for output in outputs for token in output.token_ids] == [0, 1, 2]
    assert outputs[-1].finish_reason == "stop"
    assert {output.finish_reason for output in outputs[:-1]} <= {None}


async def test_a_slow_reader_gets_everything_in_fewer_outputs(client_of: Callable[..., EngineClient]) -> None:
    async with running(client_of("answers")) as client:
        await client.wait_ready(HANG_S)
        stream = client.generate(request())
        tokens = (await anext(stream)).token_ids
        await collect(client, request("another"))  # all of the first one's outputs have come by now
        rest = [output async for output in stream]

    assert len(rest) <= 1
    assert tokens + [token for output in rest for token in output.token_ids] == [0, 1, 2]


async def test_a_refusal_is_raised_as_what_the_engine_raised(client_of: Callable[..., EngineClient]) -> None:
    async with running(client_of("answers")) as client:
        await client.wait_ready(HANG_S)
        with pytest.raises(InvalidInput) as caught:
            await collect(client, request(first_token=0))
        outputs = await collect(client, request())

    assert (caught.value.code, caught.value.message, caught.value.param) == (
        "bad_token",
        "no zeros",
        "prompt",
    )
    assert outputs[-1].finish_reason == "stop"


async def test_closing_the_iterator_cancels_the_request(client_of: Callable[..., EngineClient]) -> None:
    async with running(client_of("answers")) as client:
        await client.wait_ready(HANG_S)
        stream = client.generate(request(first_token=1))
        await anext(stream)
        await stream.aclose()

        await wait_until(lambda: client.stats is not None and client.stats.preemptions_total == 1)


async def test_a_cancelled_task_cancels_its_request(client_of: Callable[..., EngineClient]) -> None:
    async with running(client_of("answers")) as client:
        await client.wait_ready(HANG_S)
        reading = asyncio.create_task(collect(client, request(first_token=1)))
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

        await wait_until(lambda: client.stats is not None and client.stats.preemptions_total == 1)


async def test_a_request_that_cannot_be_packed_is_invalid(client_of: Callable[..., EngineClient]) -> None:
    async with running(client_of("answers")) as client:
        await client.wait_ready(HANG_S)
        broken = GenerationRequest("r", "default", [1], SamplingParams(seed=2**70))
        with pytest.raises(InvalidInput):
            await collect(client, broken)
        await collect(client, request())


async def test_unload_waits_for_the_confirmation(client_of: Callable[..., EngineClient]) -> None:
    async with running(client_of("answers")) as client:
        await client.wait_ready(HANG_S)
        await client.unload("default", "tone")


async def test_the_death_of_the_process_ends_all_requests_and_it_is_started_again(
    client_of: Callable[..., EngineClient],
) -> None:
    async with running(client_of("answers")) as client:
        await client.wait_ready(HANG_S)
        readings = [asyncio.create_task(collect(client, request(f"r{i}", first_token=1))) for i in range(5)]
        await asyncio.sleep(0.05)
        [child] = children()
        child.kill()
        results = await asyncio.gather(*readings, return_exceptions=True)
        await wait_until(lambda: client.restarts_total == 1 and client.is_ready)
        outputs = await collect(client, request())

    assert all(isinstance(result, EngineUnavailable) for result in results)
    assert outputs[-1].finish_reason == "stop"


async def test_a_process_that_speaks_nonsense_is_replaced(client_of: Callable[..., EngineClient]) -> None:
    async with running(client_of("garbage")) as client:
        await client.wait_ready(HANG_S)
        with pytest.raises(EngineUnavailable):
            await collect(client, request())
        await wait_until(lambda: client.restarts_total == 1 and client.is_ready)
        assert len(children()) == 1


async def test_a_cut_connection_is_made_again_without_a_restart(
    client_of: Callable[..., EngineClient],
) -> None:
    async with running(client_of("hangs_up")) as client:
        for number in range(3):
            await client.wait_ready(HANG_S)
            with pytest.raises(EngineUnavailable):
                await collect(client, request(f"r{number}"))
        await client.wait_ready(HANG_S)

        assert client.restarts_total == 0


@pytest.mark.parametrize("behaviour", ["stuck_in_a_step", "silent"])
async def test_a_hung_engine_is_killed_and_started_again(
    client_of: Callable[..., EngineClient], behaviour: str
) -> None:
    async with running(client_of(behaviour, heartbeat_timeout_s=1.0)) as client:
        await client.wait_ready(HANG_S)
        [child] = children()
        with pytest.raises(EngineUnavailable, match="ended"):
            await collect(client, request())
        await wait_until(lambda: client.restarts_total == 1)

        assert not child.is_running()


async def test_an_engine_that_cannot_start_says_why_and_is_tried_again(
    client_of: Callable[..., EngineClient],
) -> None:
    async with running(client_of("dies_at_start")) as client:
        await wait_until(lambda: client.restarts_total >= 2)

        assert "no such model" in (client.starting_error or "")
        assert "status 3" in (client.starting_error or "")
        assert not client.is_ready


async def test_who_waits_for_an_engine_in_vain_is_told_why(client_of: Callable[..., EngineClient]) -> None:
    async with running(client_of("dies_at_start")) as client:
        await wait_until(lambda: client.restarts_total >= 1)

        with pytest.raises(EngineUnavailable, match="no such model"):
            await client.wait_ready(0.01)
        with pytest.raises(EngineUnavailable, match="starting"):
            await collect(client, request())


async def test_a_command_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    client = EngineClient(CommonSettings(data_dir=tmp_path), "unix:///nowhere", command=["/no/such/program"])
    async with running(client):
        await wait_until(lambda: "cannot be started" in (client.starting_error or ""))


async def test_a_process_that_was_started_early_is_the_one_that_is_supervised(
    client_of: Callable[..., EngineClient],
) -> None:
    client = client_of("answers")
    client.start_process()
    [child] = await wait_until(children)
    async with running(client):
        await client.wait_ready(HANG_S)
        assert (children(), client.restarts_total) == ([child], 0)
        child.kill()
        await wait_until(lambda: client.restarts_total == 1)
        await client.wait_ready(HANG_S)
    assert not children()


async def test_a_command_that_does_not_exist_is_reported_by_start_alone(tmp_path: Path) -> None:
    client = EngineClient(CommonSettings(data_dir=tmp_path), "unix:///nowhere", command=["/no/such/program"])
    client.start_process()
    async with running(client):
        await wait_until(lambda: "cannot be started" in (client.starting_error or ""))


async def test_close_leaves_no_process_and_no_socket(
    client_of: Callable[..., EngineClient], tmp_path: Path
) -> None:
    run_folder = socket_path(tmp_path).parent  # not below tmp_path if that is long
    async with running(client_of("deaf_to_sigterm")) as client:
        await client.wait_ready(HANG_S)
        await wait_until(lambda: client.stats is not None)
        reading = asyncio.create_task(collect(client, request()))
        await asyncio.sleep(0.05)
    with pytest.raises(EngineUnavailable):
        await reading

    assert children() == []
    assert list(run_folder.iterdir()) == []
    await client.close()


async def test_close_during_the_start_leaves_no_process(client_of: Callable[..., EngineClient]) -> None:
    client = client_of("answers")
    await client.start()
    await asyncio.sleep(0)
    await client.close()

    assert children() == []


def test_restarts_wait_longer_and_longer_until_one_has_served_for_a_while() -> None:
    delay = RestartDelay(first_s=0.2, max_s=10.0, stable_s=60.0)

    assert [delay.after(0.0) for _ in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert delay.after(59.0) == 10.0, "a process that dies once a minute is no stable one"
    assert delay.after(61.0) == 0.2
    assert delay.after(0.0) == 0.4


class Watch:
    """A heartbeat of 10 s with checks that the test controls, over a process that may be stopped."""

    def __init__(self, *, pid: int | None = None, is_idle: bool = False) -> None:
        self.num_asked = 0
        self._checks = asyncio.Semaphore(0)
        self.heartbeat = Heartbeat(10.0, sleep=self._sleep)
        self.missed = asyncio.create_task(
            self.heartbeat.wait_until_missed(pid=lambda: pid, is_idle=lambda: is_idle, ask=self._ask)
        )

    async def pass_by(self, seconds: float) -> None:
        for _ in range(round(seconds / CHECK_INTERVAL_S)):
            self._checks.release()
        for _ in range(5 * round(seconds / CHECK_INTERVAL_S)):
            await asyncio.sleep(0)

    async def _sleep(self, seconds: float) -> None:
        assert seconds == CHECK_INTERVAL_S
        await self._checks.acquire()

    def _ask(self) -> None:
        self.num_asked += 1


async def test_an_engine_is_asked_before_it_is_given_up() -> None:
    watch = Watch()
    await watch.pass_by(9.75)
    assert watch.num_asked == 0
    await watch.pass_by(0.25)
    assert (watch.num_asked, watch.missed.done()) == (1, False)
    watch.heartbeat.num_beats += 1  # the answer
    await watch.pass_by(9.75)
    assert (watch.num_asked, watch.missed.done()) == (1, False)
    await watch.pass_by(0.5 + ANSWER_S)
    assert (watch.num_asked, watch.missed.done()) == (2, True)


async def test_a_pause_of_the_watching_process_counts_as_one_check() -> None:
    watch = Watch()
    await watch.pass_by(9.5)
    await watch.pass_by(0.25)  # whatever the clock says about the length of this one
    assert (watch.num_asked, watch.missed.done()) == (0, False)
    watch.missed.cancel()


@pytest.mark.parametrize("is_idle", [True, False], ids=["idle", "at work"])
async def test_a_stopped_engine_is_replaced_only_if_a_request_waits_for_it(is_idle: bool) -> None:
    process = start_child(["/bin/sleep", "1000"])
    try:
        process.send_signal(signal.SIGSTOP)
        await wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        watch = Watch(pid=process.pid, is_idle=is_idle)
        await watch.pass_by(100.0)
        assert watch.missed.done() == (not is_idle)
        process.send_signal(signal.SIGCONT)
        await wait_until(lambda: psutil.Process(process.pid).status() != psutil.STATUS_STOPPED)
        await watch.pass_by(20.0)  # minus the time that it really waited for a processor
        assert watch.missed.done(), "it runs and says nothing: it hangs, idle or not"
    finally:
        watch.missed.cancel()
        process.kill()
        process.wait()


def test_the_socket_is_private_and_its_path_short(tmp_path: Path) -> None:
    deep = tmp_path / ("long" * 30)

    for data_dir in (tmp_path, deep):
        path = socket_path(data_dir)
        assert len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES
        assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.rmdir()


def test_a_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    socket_path(tmp_path).parent.chmod(0o755)

    with pytest.raises(EngineUnavailable, match="open to others"):
        socket_path(tmp_path)


def test_sockets_of_dead_processes_are_removed(tmp_path: Path) -> None:
    path = socket_path(tmp_path)
    stale, own = (
        path.with_name("engine-999999999-abcdef.sock"),
        path.with_name(f"engine-{os.getpid()}-abcdef.sock"),
    )
    stale.touch()
    own.touch()

    socket_path(tmp_path)

    assert not stale.exists()
    assert own.exists()


def test_settings_pass_through_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    common = CommonSettings(data_dir=tmp_path, rank=4, target_modules=("q_proj", "v_proj"), device="cpu")
    engine = EngineSettings(
        num_slots=3, kv_cache_bytes=1 << 20, enable_prefix_cache=False, heartbeat_timeout_s=2.5
    )

    for name, value in to_environment([common, engine]).items():
        monkeypatch.setenv(name, value)

    assert CommonSettings() == common
    assert EngineSettings() == engine
