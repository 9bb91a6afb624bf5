"""The worker's health server, its metrics and its settings."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

from tessera.errors import InvalidInput
from trainer_worker.common import duties
from trainer_worker.common.duties import Heartbeat
from trainer_worker.common.health import HealthServer
from trainer_worker.common.metrics import TrainerMetrics
from trainer_worker.settings import read_settings
from trainer_worker.training.run import Progress


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_metrics_and_health_are_served_and_the_port_is_given_back() -> None:
    metrics, heartbeat = TrainerMetrics(), Heartbeat()
    heartbeat.num_jobs = 3
    metrics.tokens.labels("train").inc(7)
    server = HealthServer("127.0.0.1", 0, heartbeat=heartbeat, registry=metrics.registry)
    try:
        status, body = get(server.port, "/health")
        assert (status, json.loads(body)["status"], json.loads(body)["jobs"]) == (200, "ok", 3)
        status, body = get(server.port, "/metrics")
        assert status == 200
        assert 'tessera_trainer_tokens_total{kind="train"} 7.0' in body
        assert get(server.port, "/other")[0] == 404
        with pytest.raises(InvalidInput) as caught:
            HealthServer("127.0.0.1", server.port, heartbeat=heartbeat, registry=metrics.registry)
        assert caught.value.param == "TESSERA_WORKER_METRICS_PORT"
    finally:
        server.close()


class Clock:
    """A clock that the test moves, with a heartbeat that is looked at once a second."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.heartbeat = Heartbeat(clock=lambda: self.now_s)

    def pass_by(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now_s += 1.0
            self.heartbeat.look()


def test_a_stuck_event_loop_or_step_is_not_healthy() -> None:
    clock = Clock()
    heartbeat = clock.heartbeat
    server = HealthServer("127.0.0.1", 0, heartbeat=heartbeat, registry=TrainerMetrics().registry)
    try:
        assert get(server.port, "/health")[0] == 200
        clock.pass_by(duties.MAX_SILENCE_S)
        status, body = get(server.port, "/health")
        assert (status, json.loads(body)["status"]) == (503, "stuck")
    finally:
        server.close()
    heartbeat.beat()
    heartbeat.begin_step()
    assert heartbeat.report()[0]
    clock.pass_by(duties.MAX_STEP_S)
    heartbeat.beat()
    assert not heartbeat.report()[0]
    heartbeat.end_step()
    assert heartbeat.report()[0]
    clock.pass_by(duties.MAX_STEP_S)
    heartbeat.beat()
    assert heartbeat.report()[0], "no step is running"


def test_a_pause_of_the_process_does_not_count() -> None:
    clock = Clock()
    clock.heartbeat.begin_step()
    clock.pass_by(3)
    clock.now_s += 10 * duties.MAX_STEP_S  # SIGSTOP, a suspended machine
    is_healthy, figures = clock.heartbeat.report()
    assert is_healthy
    assert figures["step_s"] == figures["event_loop_silent_s"] == 3 + duties.MAX_LOOK_S


def test_series_are_named_alike_and_bounded() -> None:
    metrics = TrainerMetrics()
    for outcome in ("succeeded", "failed"):
        metrics.count_job(outcome, "lora_xs")
        metrics.count_job(outcome, "made-up-by-a-client")
    metrics.measure_success(
        Progress(initial_valid_loss=3.0, best_valid_loss=2.5, finish_reason="early_stop"), 12.0
    )
    names = {metric.name for metric in metrics.registry.collect()}
    assert all(name.startswith(("tessera_trainer_", "process_")) for name in names)
    labels = {key for m in metrics.registry.collect() for sample in m.samples for key in sample.labels}
    assert labels <= {"kind", "outcome", "method", "le"}
    assert metrics.registry.get_sample_value("tessera_trainer_early_stops_total") == 1
    unknown = {"outcome": "failed", "method": "unknown"}
    assert metrics.registry.get_sample_value("tessera_trainer_jobs_total", unknown) == 1


def test_settings_come_from_the_environment_and_misspellings_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TESSERA_WORKER_MAX_RESIDENT_JOBS", "3")
    monkeypatch.setenv("TESSERA_RANK", "4")
    monkeypatch.setenv("TESSERA_ENGINE_NUM_SLOTS", "4")
    settings, worker_settings = read_settings()
    assert (settings.rank, worker_settings.max_resident_jobs) == (4, 3)
    monkeypatch.setenv("TESSERA_WORKER_MAX_RESIDENT_JOB", "3")
    with pytest.raises(InvalidInput, match="TESSERA_WORKER_MAX_RESIDENT_JOBS"):
        read_settings()
