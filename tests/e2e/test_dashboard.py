"""The dashboard and the alerts against a real Prometheus that scrapes a real deployment, short of containers.

That is the deployed store configuration with its users, secrets as files, API keys, the service, the worker.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from deploy.replay_dashboard import DASHBOARD, Outcome, Prometheus, main, panels, replay
from service.local import is_ready
from tessera.processes.child_process import start_child
from tests.deploy.deployed_store import DeployedStore, deployed_store, free_port
from tests.waiting import HANG_S, wait_until_sync

PROMETHEUS = shutil.which("prometheus")

pytestmark = [
    pytest.mark.xdist_group("e2e"),
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (apt install prometheus)"),
]

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "deploy" / "prometheus" / "prometheus.yml"
DATA = ROOT / "examples" / "data"
#: Scrapes come every second here, so that a rate over a few seconds has something to see.
RATE_INTERVAL = "10s"

#: Panels that may be without data here, and why.
ALLOWED_EMPTY: dict[str, str] = {}


class Part:
    """One process of the deployment, which ends with this one."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self._log_path = folder / f"{name}.log"
        with self._log_path.open("wb") as log:
            self._process = start_child(command, environment={**os.environ, **environment}, output=log)

    def assert_alive(self) -> None:
        assert self._process.poll() is None, self._log_path.read_text()[-4000:]

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass
class Deployment:
    """Where the parts answer, how to get in, and what they have done."""

    service_url: str
    prometheus_url: str
    api_key: str
    parts: list[Part]
    num_generated: int = 0

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.service_url}/v1", api_key=self.api_key, max_retries=0)

    @property
    def prometheus(self) -> Prometheus:
        return Prometheus(self.prometheus_url)

    def value(self, expression: str) -> float:
        """The one value of an expression now; 0 while there is none."""
        result = self.prometheus.get("query", query=expression)["result"]
        return float(result[0]["value"][1]) if result else 0.0


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A deployment that has answered requests and trained an adapter."""
    folder = tmp_path_factory.mktemp("deployment")
    with ExitStack() as stack:
        store = stack.enter_context(deployed_store(folder))
        found = start_parts(store, folder)
        for part in found.parts:
            stack.callback(part.stop)
        wait_until_sync(lambda: has_started(found))
        send_traffic(found, folder)
        yield found
        for part in found.parts:
            part.assert_alive()


def start_parts(store: DeployedStore, folder: Path) -> Deployment:
    """The service, the worker and Prometheus, with the settings of docker-compose.yml on local ports."""
    ports = {name: free_port() for name in ("tessera-service", "tessera-trainer", "prometheus")}
    common = {
        "TESSERA_STORE_URL": store.url,
        "TESSERA_STORE_PASSWORD_FILE": str(store.password_file),
        "TESSERA_RANK": "8",
    }
    service = common | {
        "TESSERA_DATA_DIR": str(folder / "service"),
        "TESSERA_SERVICE_PORT": str(ports["tessera-service"]),
        "TESSERA_SERVICE_API_KEYS_FILE": str(store.secrets / "api_keys"),
        "TESSERA_SERVICE_SAMPLE_INTERVAL_S": "1",
    }
    worker = common | {
        "TESSERA_DATA_DIR": str(folder / "worker"),
        "TESSERA_WORKER_METRICS_PORT": str(ports["tessera-trainer"]),
    }
    parts = [
        Part("service", [sys.executable, "-m", "service"], service, folder),
        Part("worker", [sys.executable, "-m", "trainer_worker"], worker, folder),
        Part("prometheus", prometheus_command(folder, ports), {}, folder),
    ]
    return Deployment(
        service_url=f"http://127.0.0.1:{ports['tessera-service']}",
        prometheus_url=f"http://127.0.0.1:{ports['prometheus']}",
        api_key=(store.secrets / "api_key").read_text().strip(),
        parts=parts,
    )


def prometheus_command(folder: Path, ports: dict[str, int]) -> list[str]:
    """The deployed configuration, with local targets in place of container names, and faster."""
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    configuration["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(CONFIGURATION.parent / name) for name in configuration["rule_files"]]
    for job in configuration["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration))
    return [
        str(PROMETHEUS),
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{ports['prometheus']}",
        "--log.level=warn",
    ]


def has_started(deployment: Deployment) -> bool:
    """Whether the engine is ready and Prometheus has seen all targets."""
    for part in deployment.parts:
        part.assert_alive()
    if not is_ready(deployment.service_url):
        return False
    try:
        return deployment.value("sum(up) + min(tessera_engine_up)") == 4
    except ValueError:  # Prometheus itself is not up yet
        return False


def send_traffic(deployment: Deployment, folder: Path) -> None:
    """A fine-tuning job, answers with its adapter and without, a prompt that comes twice, a fault."""
    client = deployment.client
    file = folder / "train.jsonl"
    lines = (DATA / "devil.train.jsonl").read_text().splitlines()[:16]
    file.write_text("\n".join(lines) + "\n")
    uploaded = client.files.create(file=file, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=uploaded.id, suffix="devil", hyperparameters={"n_epochs": 2}
    )
    wait_until_sync(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
    adapter = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert adapter
    prompt = "The program that the user wrote is " * 4  # several KV blocks long
    for model in ("tiny", adapter, "tiny", adapter):
        completion = client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0)
        assert completion.usage
        deployment.num_generated += completion.usage.completion_tokens
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt=prompt)


def failures(outcomes: list[Outcome]) -> list[str]:
    """What is wrong and not allowed to be."""
    return [
        f"{outcome.query.place}: {outcome.error or 'no data'}: {outcome.query.expression}"
        for outcome in outcomes
        if not outcome.num_series and outcome.query.place.rpartition(" [")[0] not in ALLOWED_EMPTY
    ]


def test_every_panel_has_data_and_every_alert_is_evaluated(deployment):
    dashboard = json.loads(DASHBOARD.read_text())

    def has_data() -> bool:
        return not failures(replay(deployment.prometheus, dashboard, rate_interval=RATE_INTERVAL))

    try:
        wait_until_sync(has_data)
    except AssertionError:
        outcomes = replay(deployment.prometheus, dashboard, rate_interval=RATE_INTERVAL)
        pytest.fail("\n".join(failures(outcomes)))


def test_nothing_alerts_about_a_healthy_deployment(deployment):
    firing = [rule["name"] for rule in deployment.prometheus.alerts() if rule["state"] == "firing"]
    assert firing == []


def test_exceptions_name_panels_that_exist():
    titles = {panel["title"] for panel in panels(json.loads(DASHBOARD.read_text()))}
    assert set(ALLOWED_EMPTY) <= titles


def test_the_figures_are_those_of_the_work_done(deployment):
    generated = deployment.num_generated
    wait_until_sync(lambda: deployment.value("tessera_generation_tokens_total") == generated)
    wait_until_sync(lambda: deployment.value('tessera_adapters{tier="stored"}') == 1)
    assert deployment.value('tessera_training_jobs_ended_total{status="succeeded"}') == 1
    parts = deployment.value('sum(tessera_memory_bytes{kind!="process_rss"})')
    assert 0 < parts < deployment.value('tessera_memory_bytes{kind="process_rss"}')


def test_the_number_of_series_is_bounded(deployment):
    for job in ("tessera-service", "tessera-trainer"):
        samples = deployment.value(f'scrape_samples_post_metric_relabeling{{job="{job}"}}')
        assert 0 < samples < 1500, job


def test_a_broken_panel_is_found(deployment, tmp_path, capsys):
    dashboard: dict[str, Any] = copy.deepcopy(json.loads(DASHBOARD.read_text()))
    first, second, *_ = panels(dashboard)
    first["targets"][0]["expr"] = "tessera_renamed_bytes"
    second["targets"][0]["expr"] = "sum by (tessera_memory_bytes"
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(dashboard))

    code = main(["--prometheus-url", deployment.prometheus_url, "--dashboard", str(path)])

    lines = capsys.readouterr().out.splitlines()
    assert code == 1
    assert f"{first['title']} [A]: EMPTY" in lines
    assert any(line.startswith(f"{second['title']} [A]: ") and "parse error" in line for line in lines)
