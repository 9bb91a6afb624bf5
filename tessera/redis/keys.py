"""Every Redis key, lifetime and limit. The names carry the units.

All keys of one atomic step carry the same hash tag, so that they lie on one slot of a cluster:
`{tenant:bucket}` for an adapter with its index, `{tenant:files}` for files, `{basis:<id>}` for a basis,
`{queue}` for the job queue. The adapters of a tenant are spread over NUM_BUCKETS buckets, so that one tenant
with a million users still uses every shard.
"""

from __future__ import annotations

import re
import zlib

PREFIX = "tessera"

#: Over 6 shards, 1024 buckets leave an imbalance of 5 % and 64 buckets one of 13 %.
NUM_BUCKETS = 1024

#: Clients choose adapter names. They appear in URLs, keys and `model`, so they contain no "/", ":" or "@".
ADAPTER_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
BASIS_ID = re.compile(r"[0-9a-f]{64}")
TENANT_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

#: Longer than any job may run or any cache keeps an adapter, so that a late trainer cannot resurrect one that
#: was deleted.
TOMBSTONE_TTL_S = 30 * 24 * 3600
#: How long a finished job can be read.
JOB_TTL_S = 30 * 24 * 3600
#: How long an idempotency key is remembered.
IDEMPOTENCY_TTL_S = 24 * 3600
#: Events kept per job.
MAX_JOB_EVENTS = 2000
#: Largest reply of one MGET. A larger one stalls other clients for tens of milliseconds.
MAX_MGET_BYTES = 4 * 1024 * 1024


def bucket(object_id: str) -> int:
    return zlib.crc32(object_id.encode()) % NUM_BUCKETS


def _tenant_tag(tenant: str, number: int) -> str:
    return f"{PREFIX}:{{{tenant}:{number}}}"


# Adapters: the record is a hash, each version one packed string. The index is a zset with scores 0, for
# paging by name.


def adapter_record(tenant: str, adapter_id: str) -> str:
    return f"{_tenant_tag(tenant, bucket(adapter_id))}:adapter:{adapter_id}"


def adapter_blob(tenant: str, adapter_id: str, version: int) -> str:
    return f"{adapter_record(tenant, adapter_id)}:{version}"


def adapter_checkpoints(tenant: str, adapter_id: str) -> str:
    """A hash: step → description of the state after it, of the newest job that has such states."""
    return f"{_tenant_tag(tenant, bucket(adapter_id))}:checkpoints:{adapter_id}"


def adapter_tombstone(tenant: str, adapter_id: str) -> str:
    return f"{_tenant_tag(tenant, bucket(adapter_id))}:tombstone:{adapter_id}"


#: Fields of the tombstone's hash: the deletion count (see `AdapterStore.deletion_count`), which the store has
#: always called by this name, and the last version number that was in use.
TOMBSTONE_COUNT = "generation"
TOMBSTONE_LAST = "last"


def adapter_index(tenant: str, number: int) -> str:
    return f"{_tenant_tag(tenant, number)}:adapters"


def tenant_buckets(tenant: str) -> str:
    """A set of the buckets that may hold something. A bucket is added before the first write to it."""
    return f"{PREFIX}:{{{tenant}}}:buckets"


def tenants() -> str:
    """A set of all tenants that ever stored something."""
    return f"{PREFIX}:{{tenants}}"


# Bases: a manifest, one string per module (A, then B), a preconditioner; and indexes by recipe.


def basis_manifest(basis_id: str) -> str:
    return f"{PREFIX}:{{basis:{basis_id}}}:manifest"


def basis_module(basis_id: str, index: int) -> str:
    return f"{PREFIX}:{{basis:{basis_id}}}:module:{index}"


def basis_preconditioner(basis_id: str) -> str:
    return f"{PREFIX}:{{basis:{basis_id}}}:preconditioner"


def basis_step(basis_id: str) -> str:
    """The first step of a private basis, found in the same pass, so that it is not computed again."""
    return f"{PREFIX}:{{basis:{basis_id}}}:step"


def basis_owners(basis_id: str) -> str:
    """A hash: tenant → token of its ownership, with "*" for a shared basis. Absent if it was built as
    shared."""
    return f"{PREFIX}:{{basis:{basis_id}}}:owners"


def tenant_bases(tenant: str) -> str:
    """A hash of the private bases of a tenant: basis id → "<bytes>:<token>"."""
    return f"{PREFIX}:{{{tenant}}}:bases"


def basis_users(tenant: str, basis_id: str) -> str:
    """A hash of what uses a private basis: adapter id or name of a hold → deletion count."""
    return f"{PREFIX}:{{{tenant}}}:basis:{basis_id}:adapters"


def tenant_recipes(tenant: str) -> str:
    """A hash of private bases: recipe key (with the digest of the calibration data) → basis id."""
    return f"{PREFIX}:{{{tenant}}}:recipes"


def basis_index() -> str:
    """A hash of the shared bases: recipe key (model id, method, rank, options) → basis id.

    The first one wins.
    """
    return f"{PREFIX}:{{bases}}"


# Files: the record is a hash, the content one string, the index of a tenant a zset by time of creation.


def file_record(tenant: str, file_id: str) -> str:
    return f"{PREFIX}:{{{tenant}:files}}:file:{file_id}"


def file_content(tenant: str, file_id: str) -> str:
    return f"{PREFIX}:{{{tenant}:files}}:content:{file_id}"


def file_index(tenant: str) -> str:
    return f"{PREFIX}:{{{tenant}:files}}:index"


def idempotency(tenant: str, digest: str) -> str:
    """Return the key of what a request has created, by the digest of its idempotency key or its body."""
    return f"{PREFIX}:{{{tenant}}}:idempotency:{digest}"


# Training jobs: all keys carry one tag, because a claim looks at the backlogs of all tenants in one step.

QUEUE = f"{PREFIX}:{{queue}}"


def job_record(job_id: str) -> str:
    return f"{QUEUE}:job:{job_id}"


def job_events(job_id: str) -> str:
    return f"{QUEUE}:events:{job_id}"


def job_checkpoint(job_id: str) -> str:
    return f"{QUEUE}:checkpoint:{job_id}"


def job_backlog(tenant: str) -> str:
    """A zset of the tenant's claimable jobs by sequence number: they run in the order of submission."""
    return f"{QUEUE}:backlog:{tenant}"


def job_running(tenant: str) -> str:
    """A set of the tenant's running jobs, counted against its cap."""
    return f"{QUEUE}:running:{tenant}"


def job_index(tenant: str) -> str:
    """A zset with scores 0 of all jobs of the tenant. Job ids sort by the time of submission."""
    return f"{QUEUE}:jobs:{tenant}"


def job_dedupe(digest: str) -> str:
    """The job id of the submission with this digest of (tenant, dedupe key)."""
    return f"{QUEUE}:dedupe:{digest}"


def worker_claim(worker_id: str) -> str:
    """The worker's last claim, so that the worker can repeat a claim after a lost reply."""
    return f"{QUEUE}:claim:{worker_id}"


QUEUE_RING = f"{QUEUE}:ring"  # zset: tenant with claimable jobs → virtual time at which its next job starts
QUEUE_TAGS = f"{QUEUE}:tags"  # zset: tenant → virtual time up to which it has used its share
QUEUE_CLOCK = f"{QUEUE}:clock"  # the virtual time: the start of the job claimed last
QUEUE_SEQUENCE = f"{QUEUE}:sequence"  # the last job's sequence number: microseconds, strictly rising
QUEUE_WAITING = f"{QUEUE}:waiting"  # zset: claimable job → when it became so, ms
QUEUE_DELAYED = f"{QUEUE}:delayed"  # zset: job that may not run yet → when it may, ms
QUEUE_PAUSED = f"{QUEUE}:paused"  # set of paused jobs
QUEUE_LEASES = f"{QUEUE}:leases"  # zset: running job → the lease's deadline, ms
QUEUE_FINISHED = f"{QUEUE}:finished"  # zset: "tenant job" → when it ended, ms; to trim the indexes
QUEUE_COST = f"{QUEUE}:cost"  # summed cost of all queued jobs, tokens
QUEUE_TOTALS = f"{QUEUE}:totals"  # hash: final status → jobs that ever ended so
QUEUE_SHARES = f"{QUEUE}:shares"  # hash: "tenant:weight", "tenant:cap" → number, where not the default
QUEUE_DEAD = f"{QUEUE}:dead"  # stream of the jobs given up on after all attempts
QUEUE_WORKERS = f"{QUEUE}:workers"  # hash: worker id → "<ms> <report as JSON>" (`worker_reports.py`)
QUEUE_DOORBELL = f"{QUEUE}:doorbell"  # list that idle workers block on

#: Entries kept in the stream of jobs given up on.
MAX_DEAD_JOBS = 10_000
