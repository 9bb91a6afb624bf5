"""Every Redis key, lifetime and limit. Units stand in the names.

Everything that one atomic step touches carries one hash tag, so that it lies on one slot of a cluster:
`{tenant:bucket}` for an adapter or a file with its index, `{basis:<id>}` for a basis, `{queue}` for the job
queue. A tenant is spread over NUM_BUCKETS buckets, so one tenant with a million users still uses every shard.
"""

from __future__ import annotations

import re
import zlib

PREFIX = "tessera"

#: 1024 buckets over 6 shards leave an imbalance of 5 %, 64 buckets 13 %, one bucket all on one shard.
NUM_BUCKETS = 1024

#: Clients choose adapter names; they appear in URLs, keys and `model`, so no "/", ":" or "@".
ADAPTER_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
BASIS_ID = re.compile(r"[0-9a-f]{64}")
TENANT_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

#: Longer than any job may run and any cache keeps an adapter: a late trainer cannot resurrect a deleted one.
TOMBSTONE_TTL_S = 30 * 24 * 3600
#: How long a finished job can be read.
JOB_TTL_S = 30 * 24 * 3600
#: How long an idempotency key is remembered.
IDEMPOTENCY_TTL_S = 24 * 3600
#: Events kept per job.
MAX_JOB_EVENTS = 2000
#: Largest MGET reply asked for at once; above this Redis stalls other clients for tens of milliseconds.
MAX_MGET_BYTES = 4 * 1024 * 1024


def bucket(object_id: str) -> int:
    return zlib.crc32(object_id.encode()) % NUM_BUCKETS


def _tenant_tag(tenant: str, number: int) -> str:
    return f"{PREFIX}:{{{tenant}:{number}}}"


# Adapters: the record is a hash, each version one packed string, the index a zset (scores 0) to page by name.


def adapter_record(tenant: str, adapter_id: str) -> str:
    return f"{_tenant_tag(tenant, bucket(adapter_id))}:adapter:{adapter_id}"


def adapter_blob(tenant: str, adapter_id: str, version: int) -> str:
    return f"{adapter_record(tenant, adapter_id)}:{version}"


def adapter_tombstone(tenant: str, adapter_id: str) -> str:
    return f"{_tenant_tag(tenant, bucket(adapter_id))}:tombstone:{adapter_id}"


#: Fields of the tombstone's hash: the deletion count (see `AdapterStore.deletion_count`), which the store has
#: always called by this name, and the last version number that was in use.
TOMBSTONE_COUNT = "generation"
TOMBSTONE_LAST = "last"


def adapter_index(tenant: str, number: int) -> str:
    return f"{_tenant_tag(tenant, number)}:adapters"


def tenant_buckets(tenant: str) -> str:
    """A set of the buckets that may hold something: a superset, written before the first write to one."""
    return f"{PREFIX}:{{{tenant}}}:buckets"


def tenants() -> str:
    """A set of all tenants that ever stored something."""
    return f"{PREFIX}:{{tenants}}"


# Bases: manifest, one string per module (A then B), the preconditioner; and the name of a built recipe.


def basis_manifest(basis_id: str) -> str:
    return f"{PREFIX}:{{basis:{basis_id}}}:manifest"


def basis_module(basis_id: str, index: int) -> str:
    return f"{PREFIX}:{{basis:{basis_id}}}:module:{index}"


def basis_preconditioner(basis_id: str) -> str:
    return f"{PREFIX}:{{basis:{basis_id}}}:preconditioner"


def basis_step(basis_id: str) -> str:
    """The step that the method of an own basis found in the same pass, for a start without another one."""
    return f"{PREFIX}:{{basis:{basis_id}}}:step"


def basis_owners(basis_id: str) -> str:
    """A hash: tenant → token of its ownership; "*" for everybody. Absent if it was built for all."""
    return f"{PREFIX}:{{basis:{basis_id}}}:owners"


def tenant_bases(tenant: str) -> str:
    """A hash of the bases that a tenant owns: basis id → "<bytes>:<token>"."""
    return f"{PREFIX}:{{{tenant}}}:bases"


def basis_users(tenant: str, basis_id: str) -> str:
    """A hash of the tenant's adapters that are in a basis of its own: adapter id → deletion count."""
    return f"{PREFIX}:{{{tenant}}}:basis:{basis_id}:adapters"


def tenant_recipes(tenant: str) -> str:
    """A hash: recipe key (with the digest of the calibration data) → basis id, of the tenant's own bases."""
    return f"{PREFIX}:{{{tenant}}}:recipes"


def basis_index() -> str:
    """A hash: recipe key (model id, method, rank, options) → basis id. The first to build it wins."""
    return f"{PREFIX}:{{bases}}"


# Files: the record is a hash, the content one string, the index per tenant a zset by creation time.


def file_record(tenant: str, file_id: str) -> str:
    return f"{PREFIX}:{{{tenant}:files}}:file:{file_id}"


def file_content(tenant: str, file_id: str) -> str:
    return f"{PREFIX}:{{{tenant}:files}}:content:{file_id}"


def file_index(tenant: str) -> str:
    return f"{PREFIX}:{{{tenant}:files}}:index"


def idempotency(tenant: str, digest: str) -> str:
    """What a creation request was about, by the digest of its idempotency key or its body."""
    return f"{PREFIX}:{{{tenant}}}:idempotency:{digest}"


# Training jobs: all under one tag, because a claim looks at every tenant's backlog in one step.

QUEUE = f"{PREFIX}:{{queue}}"


def job_record(job_id: str) -> str:
    return f"{QUEUE}:job:{job_id}"


def job_events(job_id: str) -> str:
    return f"{QUEUE}:events:{job_id}"


def job_checkpoint(job_id: str) -> str:
    return f"{QUEUE}:checkpoint:{job_id}"


def job_backlog(tenant: str) -> str:
    """A zset of the tenant's claimable jobs by their sequence number: they run in the order of submission."""
    return f"{QUEUE}:backlog:{tenant}"


def job_running(tenant: str) -> str:
    """A set of the tenant's running jobs, counted against its cap."""
    return f"{QUEUE}:running:{tenant}"


def job_index(tenant: str) -> str:
    """A zset (all scores 0) of all the tenant's jobs; job ids sort by the time of submission."""
    return f"{QUEUE}:jobs:{tenant}"


def job_dedupe(digest: str) -> str:
    """The job id that a submission with this digest of (tenant, dedupe key) led to."""
    return f"{QUEUE}:dedupe:{digest}"


def worker_claim(worker_id: str) -> str:
    """The worker's last claim, so that one whose reply was lost can be asked for again."""
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
QUEUE_DOORBELL = f"{QUEUE}:doorbell"  # list that idle workers block on

#: Entries kept in the stream of jobs given up on.
MAX_DEAD_JOBS = 10_000
