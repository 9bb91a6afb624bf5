"""The Lua that all scripts of the queue share, and the atomic steps of its client side.

`lease_scripts.py` has the steps of the worker side.

A job is always in exactly one of these places, named by `status` in its record:

    queued     `waiting` and its tenant's backlog (claimable), or `delayed` (scheduled, or backing off)
    running    `leases` and its tenant's running set
    paused     `paused`
    succeeded, failed, cancelled    `finished`, until the record expires

Fairness between tenants is start-time fair queueing. A tenant with claimable jobs is in `ring`, with the
virtual time at which its next job starts. The tenant with the lowest time is claimed from; its time then
advances by cost / weight, up to which it has used its share (`tags`). A tenant that comes back starts at the
current virtual time, or at its tag if that is later, so it gains nothing by being idle or by coming back. A
job that goes back to the queue returns its charge.

The only clock is TIME of the server. A step can run twice, because a client repeats a command after its
connection broke. So each step carries a token, and `last_op` in the record remembers the last one.

Every script declares one key, QUEUE, and derives the other keys in Lua, because a claim touches tenants and
jobs that the caller cannot know. All derived keys begin with the hash tag of the declared one, so they lie on
the same slot; this is correct on Redis and Valkey, both alone and as a cluster. Dragonfly refuses undeclared
keys unless it runs with `--default_lua_flags=allow-undeclared-keys`. Each script is called from exactly one
typed method.
"""

from __future__ import annotations

from tessera.redis import keys
from tessera.redis.client import Script

#: Entries kept in the doorbell list: at least as many as workers can be waiting.
_MAX_RINGS = 64
#: Jobs moved out of `delayed`, leases reaped or index entries trimmed in one step. Bounds how long it blocks.
MAX_SWEEP = 100

_NAMES = {
    "JOB": keys.job_record(""),
    "EVENTS": keys.job_events(""),
    "CHECKPOINT": keys.job_checkpoint(""),
    "BACKLOG": keys.job_backlog(""),
    "RUNNING": keys.job_running(""),
    "INDEX": keys.job_index(""),
    "DEDUPE": keys.job_dedupe(""),
    "CLAIM": keys.worker_claim(""),
    "RING": keys.QUEUE_RING,
    "TAGS": keys.QUEUE_TAGS,
    "CLOCK": keys.QUEUE_CLOCK,
    "SEQUENCE": keys.QUEUE_SEQUENCE,
    "WAITING": keys.QUEUE_WAITING,
    "DELAYED": keys.QUEUE_DELAYED,
    "PAUSED": keys.QUEUE_PAUSED,
    "LEASES": keys.QUEUE_LEASES,
    "FINISHED": keys.QUEUE_FINISHED,
    "COST": keys.QUEUE_COST,
    "TOTALS": keys.QUEUE_TOTALS,
    "SHARES": keys.QUEUE_SHARES,
    "DEAD": keys.QUEUE_DEAD,
    "DOORBELL": keys.QUEUE_DOORBELL,
}
_LIMITS = {
    "JOB_TTL_S": keys.JOB_TTL_S,
    "MAX_EVENTS": keys.MAX_JOB_EVENTS,
    "MAX_DEAD": keys.MAX_DEAD_JOBS,
    "MAX_RINGS": _MAX_RINGS,
    "MAX_SWEEP": MAX_SWEEP,
}

_SHARED = """
local call = redis.call
local clock = call('TIME')
local NOW_US = clock[1] * 1000000 + clock[2]
local NOW = math.floor(NOW_US / 1000)

-- Numbers as text: Lua itself would write large ones as 1.7e+12.
local function whole(number) return string.format('%.0f', number) end
local function precise(number) return string.format('%.17g', number) end

local function get(id, name) return call('HGET', JOB .. id, name) end
local function set(id, ...) call('HSET', JOB .. id, ...) end
local function number(id, name) return tonumber(get(id, name) or 0) end

-- Append an event to the history of the job.
local function log(id, level, message, kind, data)
  call('XADD', EVENTS .. id, 'MAXLEN', '~', MAX_EVENTS, '*', 'level', level, 'type', kind or 'message',
       'message', message, 'data', data or '{}')
end

-- The reply for one job: its id, its record, and its place in the backlog (0: none).
local function view(id)
  local tenant = get(id, 'tenant')
  local rank = tenant and call('ZRANK', BACKLOG .. tenant, id)
  return {id, call('HGETALL', JOB .. id), rank and rank + 1 or 0}
end

-- Let jobs of this tenant be claimed, if it has any. (A claim checks the cap.) Then wake a waiting worker.
local function enter_ring(tenant)
  if call('EXISTS', BACKLOG .. tenant) == 0 then return end
  if not call('ZSCORE', RING, tenant) then
    local tag = tonumber(call('ZSCORE', TAGS, tenant) or 0)
    call('ZADD', RING, precise(math.max(tag, tonumber(call('GET', CLOCK) or 0))), tenant)
  end
  call('LPUSH', DOORBELL, 1)
  call('LTRIM', DOORBELL, 0, MAX_RINGS - 1)
end

-- Queue the job: claimable now, or delayed until it is due.
local function enqueue(id)
  local tenant, sequence, cost, due = unpack(call('HMGET', JOB .. id, 'tenant', 'sequence', 'cost', 'due_ms'))
  set(id, 'status', 'queued')
  call('INCRBY', COST, cost)
  if due and tonumber(due) > NOW then
    call('ZADD', DELAYED, due, id)
  else
    call('HDEL', JOB .. id, 'due_ms')
    call('ZADD', BACKLOG .. tenant, sequence, id)
    call('ZADD', WAITING, whole(NOW), id)
    enter_ring(tenant)
  end
end

-- Take the job out of the queue, and its tenant out of the ring if it has no other.
local function dequeue(id)
  local tenant, cost = unpack(call('HMGET', JOB .. id, 'tenant', 'cost'))
  call('INCRBY', COST, -cost)
  call('ZREM', DELAYED, id)
  call('ZREM', WAITING, id)
  call('ZREM', BACKLOG .. tenant, id)
  if call('EXISTS', BACKLOG .. tenant) == 0 then call('ZREM', RING, tenant) end
end

-- Make delayed jobs claimable that have become due. Forget those without a record.
local function enqueue_due()
  for _, id in ipairs(call('ZRANGEBYSCORE', DELAYED, '-inf', whole(NOW), 'LIMIT', 0, MAX_SWEEP)) do
    if get(id, 'tenant') then
      dequeue(id)
      enqueue(id)
    else
      call('ZREM', DELAYED, id)
    end
  end
end

-- Set the job aside for its owner.
local function park(id)
  set(id, 'status', 'paused')
  call('HDEL', JOB .. id, 'pause_requested')
  call('SADD', PAUSED, id)
  log(id, 'info', 'Job paused')
end

-- End the job with a final status, and let its record expire.
local function finish(id, status, level, message)
  set(id, 'status', status, 'finished_ms', whole(NOW))
  call('HDEL', JOB .. id, 'cancel_requested', 'pause_requested', 'stop_requested', 'due_ms')
  call('DEL', CHECKPOINT .. id)
  log(id, level, message)
  call('EXPIRE', JOB .. id, JOB_TTL_S)
  call('EXPIRE', EVENTS .. id, JOB_TTL_S)
  call('ZADD', FINISHED, whole(NOW), get(id, 'tenant') .. ' ' .. id)
  call('HINCRBY', TOTALS, status, 1)
end
"""


def queue_script(*bodies: str) -> Script:
    """Return a script of the shared functions and these Lua texts. Its only declared key is `keys.QUEUE`."""
    names = [f"local {name} = '{key}'" for name, key in _NAMES.items()]
    limits = [f"local {name} = {limit}" for name, limit in _LIMITS.items()]
    return Script("\n".join([*names, *limits, _SHARED, *bodies]))


#: ARGV: tenant, digest of the dedupe key, its lifetime (s), tail of the id, spec, cost, due (ms or 0), basis,
#: prefix of the id.
#: Reply: the new job, or the earlier one if the dedupe key is known.
SUBMIT = queue_script("""
local tenant, dedupe, dedupe_ttl, tail, spec, cost, due, basis, prefix = unpack(ARGV)
-- A repeated submission returns the job of the first.
local known = call('GET', DEDUPE .. dedupe)
if known and get(known, 'status') then return view(known) end

-- Ids contain the sequence number, so they sort by the time of submission.
local sequence = math.max(NOW_US, tonumber(call('GET', SEQUENCE) or 0) + 1)
call('SET', SEQUENCE, whole(sequence))
local id = prefix .. string.format('%07x%06x', math.floor(sequence / 16777216), sequence % 16777216) .. tail

-- Write the record, then make the job known by its dedupe key and in the tenant's list.
set(id, 'tenant', tenant, 'spec', spec, 'cost', cost, 'basis', basis, 'sequence', whole(sequence),
    'created_ms', whole(NOW), 'attempt', 0, 'epoch', 0)
if tonumber(due) > NOW then set(id, 'due_ms', due) end
call('SET', DEDUPE .. dedupe, id, 'EX', dedupe_ttl)
call('ZADD', INDEX .. tenant, 0, id)
log(id, 'info', 'Job queued')
enqueue(id)
return view(id)
""")

#: ARGV: tenant, job id. Reply: the job, or nil if this tenant has no such job.
GET = queue_script("""
local tenant, id = unpack(ARGV)
return get(id, 'tenant') == tenant and view(id)
""")

#: ARGV: tenant, job id to continue after (or ''), limit, prefix of the ids.
#: Reply: up to limit + 1 jobs, newest first.
LIST = queue_script("""
local tenant, after, limit, prefix = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local jobs = {}
if after ~= '' and string.sub(after, 1, #prefix) ~= prefix then return jobs end
-- Without an id to continue after, begin above all ids: '~' sorts after every hex digit.
local from = after == '' and '(' .. prefix .. '~' or '(' .. after
-- Records may have expired before their index entries, so read on until the page is full.
while #jobs <= limit do
  local ids = call('ZREVRANGEBYLEX', INDEX .. tenant, from, '[' .. prefix, 'LIMIT', 0, limit + 1)
  if #ids == 0 then break end
  for _, id in ipairs(ids) do
    if #jobs <= limit and get(id, 'status') then jobs[#jobs + 1] = view(id) end
  end
  from = '(' .. ids[#ids]
end
return jobs
""")

#: ARGV: tenant, job id, event id to continue after (or ''), limit. Reply: up to limit + 1 events, or nil.
LIST_EVENTS = queue_script("""
local tenant, id, after, limit = unpack(ARGV)
if get(id, 'tenant') ~= tenant then return false end
return call('XREVRANGE', EVENTS .. id, after == '' and '+' or '(' .. after, '-', 'COUNT', limit + 1)
""")

# ARGV of the four commands: tenant, job id, token.
# Reply: the job; its status, if that forbids the command; or nil if this tenant has no such job.
_COMMAND = """
local tenant, id, token = unpack(ARGV)
if get(id, 'tenant') ~= tenant then return false end
-- This very command was carried out before.
if get(id, 'last_op') == token then return view(id) end
local status = get(id, 'status')
"""
_DONE = """
set(id, 'last_op', token)
return view(id)
"""

CANCEL = queue_script(
    _COMMAND,
    """
-- A running job ends when its worker has stopped; any other ends now.
if status == 'running' then
  if call('HSET', JOB .. id, 'cancel_requested', 1) == 1 then log(id, 'info', 'Cancellation requested') end
elseif status == 'queued' then
  dequeue(id)
  finish(id, 'cancelled', 'info', 'Job cancelled')
elseif status == 'paused' then
  call('SREM', PAUSED, id)
  finish(id, 'cancelled', 'info', 'Job cancelled')
else
  return status
end
""",
    _DONE,
)

PAUSE = queue_script(
    _COMMAND,
    """
-- A running job pauses after its next checkpoint, a queued one now; a paused one stays so.
if status == 'running' then
  if get(id, 'cancel_requested') then return 'being cancelled' end
  if get(id, 'stop_requested') then return 'being stopped' end
  if call('HSET', JOB .. id, 'pause_requested', 1) == 1 then log(id, 'info', 'Pause requested') end
elseif status == 'queued' then
  dequeue(id)
  park(id)
elseif status ~= 'paused' then
  return status
end
""",
    _DONE,
)

RESUME = queue_script(
    _COMMAND,
    """
-- Queue a paused job again, or withdraw a pause that its worker has not carried out yet.
if status == 'paused' then
  call('SREM', PAUSED, id)
  log(id, 'info', 'Job resumed')
  enqueue(id)
elseif status == 'running' then
  if call('HDEL', JOB .. id, 'pause_requested') == 1 then log(id, 'info', 'Pause withdrawn') end
elseif status ~= 'queued' then
  return status
end
""",
    _DONE,
)

STOP = queue_script(
    _COMMAND,
    """
-- A worker publishes the best state so far and ends the job: the one that has it, or the next one.
if status ~= 'running' and status ~= 'queued' and status ~= 'paused' then return status end
if get(id, 'cancel_requested') then return 'being cancelled' end
if tonumber(get(id, 'best_step') or 0) < 1 then
  return 'before its first step, so there is nothing to keep yet; wait for a step, or cancel the job'
end
call('HDEL', JOB .. id, 'pause_requested')
if call('HSET', JOB .. id, 'stop_requested', 1) == 1 then log(id, 'info', 'Stop requested') end
if status == 'paused' then
  call('SREM', PAUSED, id)
  enqueue(id)
end
""",
    _DONE,
)

#: ARGV: tenant, weight, cap ('' for the default of the workers).
SET_SHARE = queue_script("""
local tenant, weight, cap = unpack(ARGV)
call('HSET', SHARES, tenant .. ':weight', weight)
if cap == '' then call('HDEL', SHARES, tenant .. ':cap') else call('HSET', SHARES, tenant .. ':cap', cap) end
-- A higher cap may make more of its jobs claimable.
enter_ring(tenant)
""")

#: Reply: number of waiting, delayed, running, paused jobs; age of the oldest waiting one (ms); cost of all
#: queued jobs; totals as name, value, …
STATS = queue_script("""
local oldest = call('ZRANGE', WAITING, 0, 0, 'WITHSCORES')
return {call('ZCARD', WAITING), call('ZCARD', DELAYED), call('ZCARD', LEASES), call('SCARD', PAUSED),
        oldest[2] and NOW - oldest[2] or 0, tonumber(call('GET', COST) or 0), call('HGETALL', TOTALS)}
""")
