"""Prometheus' configuration and alerts, checked by Prometheus' own tool."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.replay_dashboard import metric_names
from tests.deploy.exposed_metrics import SCRAPE_LABELS, exposed_labels
from tests.deploy.test_dashboard import used_labels
from tests.waiting import HANG_S

FOLDER = Path(__file__).parent.parent.parent / "deploy" / "prometheus"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)"
)


@pytest.fixture(scope="module")
def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_has_nothing_to_say(arguments):
    done = subprocess.run(
        ["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout + done.stderr


def test_every_alert_says_how_bad_it_is_and_what_to_do(alerts):
    names = [alert["alert"] for alert in alerts]
    assert len(set(names)) == len(names)
    for alert in alerts:
        assert alert["labels"]["severity"] in {"critical", "warning"}, alert["alert"]
        assert alert["annotations"]["summary"], alert["alert"]
        assert alert["annotations"]["description"], alert["alert"]


def test_every_alert_has_a_case_in_which_it_fires(alerts):
    text = (FOLDER / "alerts_test.yml").read_text()
    tests = yaml.safe_load(text)["tests"]
    fired = {
        case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case["exp_alerts"]
    }
    for alert in alerts:
        name = alert["alert"]
        assert name in fired or f'ALERTS{{alertname="{name}", alertstate="firing"' in text, name


def test_every_metric_and_label_of_the_alerts_exists_in_the_code(alerts):
    exposed = exposed_labels()
    for alert in alerts:
        names = metric_names(alert["expr"])
        assert names, alert["alert"]
        for name in names:
            assert name in exposed, f"{alert['alert']}: the code has no metric {name}"
        labels = set().union(*(exposed[name] for name in names)) | SCRAPE_LABELS | {"le"}
        assert used_labels(alert["expr"]) <= labels, alert["alert"]


def test_the_jobs_that_are_scraped_are_the_services_of_compose(alerts):
    jobs = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    compose = yaml.safe_load((FOLDER.parent.parent / "docker-compose.yml").read_text())
    for name, variable in (("service", "TESSERA_SERVICE_PORT"), ("trainer", "TESSERA_WORKER_METRICS_PORT")):
        (job,) = [job for job in jobs if job["job_name"] == f"tessera-{name}"]
        (discovery,) = job["dns_sd_configs"]
        assert discovery["names"] == [name]
        assert str(discovery["port"]) == compose["services"][name]["environment"][variable]
        assert set(compose["services"][name]["networks"]) & set(compose["services"]["prometheus"]["networks"])
