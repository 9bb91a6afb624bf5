"""The Grafana dashboard as a file: every rule that can be checked without Grafana or Prometheus."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.replay_dashboard import DASHBOARD, metric_names, panel_queries, panels
from tests.deploy.exposed_metrics import SCRAPE_LABELS, exposed_labels

GRAFANA = DASHBOARD.parent.parent
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

#: Labels that would name a user, or something that a user chose or that never ends.
PERSONAL_LABELS = {"tenant", "user", "adapter", "adapter_id", "job", "job_id", "model", "key", "request_id"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def test_the_dashboard_is_named_and_found_by_a_fixed_uid(dashboard):
    assert dashboard["title"] == "Tessera: memory and serving"
    assert dashboard["uid"] == "tessera-memory-serving"
    assert dashboard["id"] is None, "an id belongs to one database; the uid is what travels"
    assert dashboard["description"]
    assert dashboard["editable"] is False


def test_the_data_source_is_a_template_variable(dashboard):
    (variable,) = [v for v in dashboard["templating"]["list"] if v["type"] == "datasource"]
    provisioned = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())
    (source,) = provisioned["datasources"]
    assert variable["name"] == "datasource"
    assert variable["query"] == "prometheus"
    assert variable["current"] == {"text": source["name"], "value": source["uid"]}
    for panel in panels(dashboard):
        assert panel["datasource"] == DATASOURCE, panel["title"]
        assert all(target["datasource"] == DATASOURCE for target in panel["targets"]), panel["title"]


def test_the_provisioned_folder_is_where_compose_mounts_the_dashboards():
    provider = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "tessera.yml").read_text())
    compose = yaml.safe_load((GRAFANA.parent.parent / "docker-compose.yml").read_text())
    mounts = dict(v.split(":")[:2] for v in compose["services"]["grafana"]["volumes"] if v.startswith("./"))
    assert mounts["./deploy/grafana/dashboards"] == provider["providers"][0]["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    home = compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).name == DASHBOARD.name


def test_ids_and_titles_are_unique(dashboard):
    everything = dashboard["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(set(titles)) == len(titles)


def test_the_rows_are_memory_serving_training_and_store(dashboard):
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == ["Memory", "Serving", "Training", "Store"]


def test_every_panel_says_what_it_shows_and_in_which_unit(dashboard):
    for panel in panels(dashboard):
        title = panel["title"]
        assert title
        assert panel["description"].endswith("."), title
        assert panel["fieldConfig"]["defaults"]["unit"], title
        assert panel["targets"], title
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters), title
        for target in panel["targets"]:
            assert target["legendFormat"], f"{title}: a legend of label sets is unreadable"


def test_panels_fill_the_grid_without_overlap(dashboard):
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_rates_are_taken_of_counters_over_grafanas_own_intervals(dashboard):
    for panel in panels(dashboard):
        for target in panel["targets"]:
            for function, argument, window in re.findall(
                r"\b(rate|increase|irate)\(\s*(\w+)(?:\{[^}]*\})?\[([^\]]+)\]", target["expr"]
            ):
                assert function != "irate", panel["title"]
                assert argument.endswith(("_total", "_bucket", "_sum", "_count")), target["expr"]
                assert window in {"$__rate_interval", "$__range"}, target["expr"]


def test_every_metric_and_label_exists_in_the_code(dashboard):
    exposed = exposed_labels()
    for query in panel_queries(dashboard, rate_interval="1m"):
        names = metric_names(query.expression)
        assert names, query
        for name in names:
            assert name in exposed, f"{query.place}: the code has no metric {name}"
        labels = set().union(*(exposed[name] for name in names)) | SCRAPE_LABELS | {"le"}
        for used in used_labels(query.expression):
            assert used in labels, f"{query.place}: {sorted(names)} have no label {used}"


def used_labels(expression: str) -> set[str]:
    """Labels by which an expression groups or selects."""
    grouped = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expression)
    selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=(?!=))\s*\"", expression)
    return {label.strip() for group in grouped for label in group.split(",") if label.strip()} | set(selected)


def test_no_metric_names_a_user():
    for name, labels in exposed_labels().items():
        assert not labels & PERSONAL_LABELS, name


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("tessera_memory_bytes", {"tessera_memory_bytes"}),
        ("sum by (kind) (tessera_memory_bytes)", {"tessera_memory_bytes"}),
        (
            'rate(tessera_a_total{x="tessera_no"}[1m]) / on (tessera_l) tessera_b',
            {"tessera_a_total", "tessera_b"},
        ),
        ('up{job=~"tessera-.*"} == 0', {"up"}),
        ("process_resident_memory_bytes", {"process_resident_memory_bytes"}),
    ],
)
def test_metric_names_are_found_in_an_expression(expression, names):
    assert metric_names(expression) == names
