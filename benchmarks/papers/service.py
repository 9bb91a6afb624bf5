"""A running service as the tables need it: upload, train, score, delete. Knows no table.

Only REST: the service may be another machine's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

#: Seconds between two looks at the jobs.
POLL_S = 1.0
#: Items of one request to /v1/score.
MAX_ITEMS = 32
FINAL = ("succeeded", "failed", "cancelled")


class JobFailed(Exception):
    """A job of a table did not succeed."""


@dataclass(frozen=True)
class Trained:
    """A job that has succeeded."""

    #: The adapter's id, which is a model of the service.
    model: str
    #: The lowest loss on what the job held back.
    valid_loss: float
    #: Seconds from its start to its end.
    seconds: float


class Service:
    """A client of one service; a context manager that closes its connections."""

    def __init__(self, url: str, api_key: str) -> None:
        """url: up to and with /v1."""
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=600)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def base_model(self) -> str:
        """Return the id of the base model, which is listed first."""
        return str(self._json(self._http.get("/models"))["data"][0]["id"])

    def upload(self, path: Path) -> str:
        """Upload a file of examples and return its id."""
        files = {"file": (path.name, path.read_bytes())}
        return str(self._json(self._http.post("/files", files=files, data={"purpose": "fine-tune"}))["id"])

    def submit(self, body: Mapping[str, Any]) -> str:
        """Queue a job and return its id."""
        return str(self._json(self._http.post("/fine_tuning/jobs", json=body))["id"])

    def wait(self, job_id: str, *, timeout_s: float) -> Trained:
        """Wait until the job has ended. Raises `JobFailed`."""
        deadline = time.monotonic() + timeout_s
        while True:
            job = self._json(self._http.get(f"/fine_tuning/jobs/{job_id}"))
            if job["status"] in FINAL:
                break
            if time.monotonic() > deadline:
                raise JobFailed(f"job {job_id} is {job['status']} after {timeout_s:g} s")
            time.sleep(POLL_S)
        if job["status"] != "succeeded":
            raise JobFailed(f"job {job_id} {job['status']}: {job['error']}")
        seconds = job["finished_at"] - (job.get("started_at") or job["created_at"])
        return Trained(job["fine_tuned_model"], float(job["result"]["best_valid_loss"]), seconds)

    def loss(self, model: str, path: Path) -> float:
        """Return the mean loss of the answers in a file, in nats per token."""
        lines = path.read_text(encoding="utf-8").splitlines()
        items = [{"messages": json.loads(line)["messages"]} for line in lines]
        total = count = 0.0
        for first in range(0, len(items), MAX_ITEMS):
            body = {"model": model, "input": items[first : first + MAX_ITEMS]}
            for item in self._json(self._http.post("/score", json=body))["data"]:
                total -= item["sum_logprob"]
                count += item["num_tokens"]
        return total / count

    def delete(self, models: Sequence[str]) -> None:
        """Delete adapters, so that their private bases no longer count against the quota."""
        for model in models:
            self._http.delete(f"/adapters/{model}").raise_for_status()

    @staticmethod
    def _json(reply: httpx.Response) -> dict[str, Any]:
        if reply.is_error:
            raise JobFailed(f"{reply.request.method} {reply.request.url}: {reply.status_code} {reply.text}")
        return dict(reply.json())
