"""The worker as a process of its own: killed in the middle of a job, and stopped by a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redis.asyncio import Redis

from tessera.processes.child_process import start_child
from tessera.queue.client import Job, JobQueue, JobSpec, JobStatus
from tessera.redis import keys
from tessera.store.adapters import AdapterStore
from tessera.store.files import FileStore
from tessera.store.ownership import PrivateBases
from tests.job_checks import check_queue
from tests.trainer_worker.conftest import DATA
from tests.waiting import HANG_S, wait_until

TENANT = "acme"


@contextmanager
def worker_process(redis_url: str, folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {
        **os.environ,
        "TESSERA_STORE_URL": redis_url,
        "TESSERA_DATA_DIR": str(folder),
        "TESSERA_WORKER_WORKER_ID": name,
        "TESSERA_WORKER_METRICS_PORT": "0",
        "TESSERA_WORKER_LEASE_S": "4",
        "TESSERA_WORKER_REAP_EVERY_S": "0.2",
        "TESSERA_WORKER_CHECKPOINT_EVERY_S": "0.2",
        "TESSERA_WORKER_REPORT_EVERY_S": "0",
    }
    process = start_child([sys.executable, "-m", "trainer_worker"], environment=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def step_of(checkpoint: bytes) -> int:
    """The step of a checkpoint, from the header of its safetensors file."""
    header = json.loads(checkpoint[8 : 8 + int.from_bytes(checkpoint[:8], "little")])
    step: int = json.loads(header["__metadata__"]["tessera_run"])["progress"]["step"]
    return step


async def test_a_worker_killed_in_the_middle_is_replaced_and_one_version_is_published(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    """All attempts train in one basis, which the job builds from its own data, from one initialization."""
    queue = JobQueue(redis)
    content = b"\n".join((DATA / "devil.jsonl").read_bytes().split(b"\n")[:12])
    file = await FileStore(redis).put(TENANT, filename="d.jsonl", purpose="fine-tune", content=content)
    spec = JobSpec(
        adapter_id="devil", training_file=file.file_id, base_model="tiny", rank=8,
        hyperparameters={"n_epochs": 8, "batch_size": 2}, early_stopping={"patience": None},
        method="lora_sb", calibration="own", target_modules=["*.layers.1.*.down_proj", "*.layers.0.*.v_proj"],
        start={"method": "sb_step", "options": {}},
    )  # fmt: skip
    job_id = (await queue.submit(TENANT, spec, cost=10)).job_id

    async def job() -> Job:
        return await queue.get(TENANT, job_id)

    async def is_checkpointed() -> bool:
        found = await job()
        assert not found.status.is_final, found
        content = await redis.get(keys.job_checkpoint(job_id))
        return content is not None and step_of(content) >= 1  # the first one holds only the initialization

    with worker_process(redis_url, tmp_path, "first") as first:
        await wait_until(is_checkpointed, HANG_S)
        with worker_process(redis_url, tmp_path, "second") as second:
            first.kill()
            first.wait()

            async def has_ended() -> bool:
                return (await job()).status.is_final

            await wait_until(has_ended, HANG_S)
            second.send_signal(signal.SIGTERM)
            assert second.wait(HANG_S) == 0

    ended = await job()
    assert ended.status is JobStatus.SUCCEEDED, ended.error
    assert (ended.attempt, ended.epoch, ended.num_lost_workers) == (1, 2, 1), "it had made progress"
    assert ended.result is not None
    assert ended.result["steps"] == 40
    record = await AdapterStore(redis).get(TENANT, "devil")
    assert [version.version for version in record.versions] == [1]
    own = PrivateBases(redis, max_bytes=2**30)
    assert set(await own.of_tenant(TENANT)) == {ended.result["basis_id"]}
    assert await own.users(TENANT, ended.result["basis_id"]) == {"devil"}
    events, _ = await queue.events(TENANT, job_id, None, 1000)
    assert len([event for event in events if event.message.startswith("Initialization sb_step")]) == 1
    [resumed] = [event.message for event in events if "continues at step" in event.message]
    assert int(resumed.split()[4]) >= 1
    await check_queue(redis)
