"""Run every query of the Grafana dashboard, and every alert, against a running Prometheus.

    python3 deploy/replay_dashboard.py --prometheus-url http://127.0.0.1:9090

A query must succeed, and a panel must show at least one finite value in the last minutes, else the exit code
is 1: a dashboard whose metric was renamed looks just like a quiet system. Needs nothing but Python; knows
Grafana's dashboard JSON and Prometheus' HTTP API, and nothing of Tessera.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "grafana" / "dashboards" / "tessera.json"

#: Long enough for a request or a job to have happened, short enough to see that a metric has vanished.
WINDOW_S = 300
STEP_S = 5

_METRIC = re.compile(r"\b(?:tessera|process|up)(?:_\w+)?\b(?!\s*\()")
_NOT_METRICS = re.compile(
    r'"[^"]*"|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)|\[[^\]]*\]'
)


@dataclass(frozen=True)
class Query:
    """One expression and where it stands: a panel's title with the query's letter, or an alert's name."""

    place: str
    expression: str


@dataclass(frozen=True)
class Outcome:
    """What a query brought: an error, or the number of series with a finite value in the window."""

    query: Query
    num_series: int = 0
    error: str | None = None


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel that shows something, those of collapsed rows too."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", [])
        else:
            yield panel


def panel_queries(dashboard: dict[str, Any], *, rate_interval: str) -> list[Query]:
    """The dashboard's queries, with Grafana's interval variables filled in."""
    values = {"__rate_interval": rate_interval, "__interval": f"{STEP_S}s", "__range": f"{WINDOW_S}s"}
    queries = []
    for panel in panels(dashboard):
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in values.items():
                expression = expression.replace(f"${{{name}}}", value).replace(f"${name}", value)
            queries.append(Query(f"{panel['title']} [{target['refId']}]", expression))
    return queries


def metric_names(expression: str) -> set[str]:
    """The metrics of `tessera_`, `process_` and `up` that an expression reads."""
    return set(_METRIC.findall(_NOT_METRICS.sub(" ", expression)))


class Prometheus:
    """The part of Prometheus' HTTP API that is needed here."""

    def __init__(self, url: str, *, timeout_s: float = 10.0) -> None:
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s

    def run(self, query: Query) -> Outcome:
        """Evaluate a query over the last WINDOW_S seconds."""
        now = time.time()
        try:
            data = self.get("query_range", query=query.expression, start=now - WINDOW_S, end=now, step=STEP_S)
        except ValueError as error:
            return Outcome(query, error=str(error))
        finite = [
            series
            for series in data["result"]
            if any(math.isfinite(float(value)) for _, value in series["values"])
        ]
        return Outcome(query, num_series=len(finite))

    def alerts(self) -> list[dict[str, Any]]:
        """The alert rules as Prometheus knows them: name, query, health ("ok" once evaluated), lastError …"""
        groups = self.get("rules", type="alert")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def get(self, path: str, **parameters: object) -> Any:
        """The `data` of an answer. Raises `ValueError` with what Prometheus says is wrong."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=self._timeout_s) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            raise ValueError(json.load(error).get("error", str(error))) from error
        except OSError as error:
            raise ValueError(f"{self._url} does not answer: {error}") from error
        return answer["data"]


def replay(prometheus: Prometheus, dashboard: dict[str, Any], *, rate_interval: str) -> list[Outcome]:
    """Run every query of the panels, and of the alerts, which are quiet, every metric that they read."""
    outcomes = [prometheus.run(query) for query in panel_queries(dashboard, rate_interval=rate_interval)]
    for rule in prometheus.alerts():
        place = f"alert {rule['name']}"
        if rule["health"] != "ok":
            error = rule.get("lastError") or f"health is {rule['health']}"
            outcomes.append(Outcome(Query(place, rule["query"]), error=error))
        outcomes += [
            prometheus.run(Query(f"{place}: {name}", name)) for name in sorted(metric_names(rule["query"]))
        ]
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run a dashboard's queries against a running Prometheus.")
    parser.add_argument("--prometheus-url", default="http://127.0.0.1:9090")
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD)
    parser.add_argument("--rate-interval", default="1m", help="what $__rate_interval stands for")
    options = parser.parse_args(arguments)
    dashboard = json.loads(options.dashboard.read_text())
    try:
        outcomes = replay(Prometheus(options.prometheus_url), dashboard, rate_interval=options.rate_interval)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for outcome in outcomes:
        result = outcome.error or (f"{outcome.num_series} series" if outcome.num_series else "EMPTY")
        sys.stdout.write(f"{outcome.query.place}: {result}\n")
    return 0 if all(outcome.num_series for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
