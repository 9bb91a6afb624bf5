"""What workers have measured about themselves, for estimates: how fast they train, and what room they have.

Each worker replaces its report every few seconds. The times are those of the server's clock. A report that is
old belongs to a worker that is gone; its speed still says what a worker like it would do. This module knows
nothing of training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from tessera.redis import keys
from tessera.redis.client import Client, Script

#: A worker that has not reported for longer is gone.
ALIVE_S = 30.0
#: A report that is older than this is dropped.
MAX_AGE_S = 24 * 3600
#: What a token of an evaluation costs, beside one that is trained on: it has no backward pass.
EVALUATION_COST = 1 / 3

# KEYS: reports. ARGV: worker id, report, age in ms beyond which reports are dropped
_POST = Script("""
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f ', now) .. ARGV[2])
local known = redis.call('HGETALL', KEYS[1])
for i = 1, #known, 2 do
  if now - tonumber(string.match(known[i + 1], '^%d+') or 0) > tonumber(ARGV[3]) then
    redis.call('HDEL', KEYS[1], known[i])
  end
end
""")

# KEYS: reports. Reply: now in ms, then the reports
_READ = Script("""
local clock = redis.call('TIME')
return {string.format('%.0f', clock[1] * 1000 + math.floor(clock[2] / 1000)), redis.call('HVALS', KEYS[1])}
""")


@dataclass(frozen=True)
class WorkerReport:
    """One worker's measurements; None where it has not measured yet."""

    #: Jobs that the worker could take in now.
    free_slots: int = 0
    #: Seconds of a training step, beside `token_s` for each of its tokens. A token of an evaluation counts as
    #: a third; padding counts like the tokens that it stands beside.
    step_s: float | None = None
    token_s: float | None = None
    #: Padding per token.
    padding: float = 0.0
    #: Seconds of a job beside its training: reading, encoding, preparing, publishing.
    fixed_s: float | None = None
    #: Measured seconds of training divided by those that step_s and token_s give for the job alone: what
    #: sharing a worker and searching for a learning rate add.
    load: float = 1.0
    #: Seconds since the report.
    age_s: float = 0.0

    @property
    def is_alive(self) -> bool:
        return self.age_s <= ALIVE_S

    def training_seconds(self, *, steps: int, train_tokens: int, eval_tokens: int) -> float | None:
        """Return the training time of a job that has the worker for itself; None if nothing was measured."""
        if self.step_s is None or self.token_s is None:
            return None
        useful = train_tokens + EVALUATION_COST * eval_tokens
        return steps * self.step_s + useful * (1 + self.padding) * self.token_s


class WorkerReports:
    """The reports of all workers. Every method raises `StoreUnavailable`, `post` also `StoreFull`."""

    def __init__(self, redis: Client) -> None:
        self._redis = redis

    async def post(self, worker_id: str, report: WorkerReport) -> None:
        """Replace the worker's report."""
        text = json.dumps(asdict(report))
        await _POST(self._redis, keys=[keys.QUEUE_WORKERS], args=[worker_id, text, int(MAX_AGE_S * 1000)])

    async def read(self) -> Sequence[WorkerReport]:
        """Return all reports. One that cannot be read is left out."""
        now, texts = await _READ(self._redis, keys=[keys.QUEUE_WORKERS], args=[])
        found = [_parse(text, int(now)) for text in texts]
        return [report for report in found if report is not None]


def _parse(text: bytes, now_ms: int) -> WorkerReport | None:
    at, _, report = text.partition(b" ")
    try:
        values: dict[str, Any] = json.loads(report)
        known = {field.name for field in fields(WorkerReport)}
        values = {name: value for name, value in values.items() if name in known}
        return WorkerReport(**{**values, "age_s": max(0.0, (now_ms - int(at)) / 1000)})
    except (ValueError, TypeError, AttributeError):
        return None
