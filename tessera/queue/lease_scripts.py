"""The atomic steps of the queue's worker side. The shared Lua and the places of a job: `client_scripts.py`.

Every step on a running job names its epoch, which each claim raises by one: whoever holds an older epoch is
told so ('stale') and changes nothing. The reply 'repeated' means that this very step was already done.
"""

from __future__ import annotations

from tessera.queue.client_scripts import queue_script

#: A worker with a basis loaded prefers a tenant's jobs on it among that many of the tenant's oldest …
LOOKAHEAD = 16
#: … but no job is overtaken more often than this by its own tenant's later ones.
MAX_OVERTAKES = 8

_RUN = f"""
local LOOKAHEAD, MAX_OVERTAKES = {LOOKAHEAD}, {MAX_OVERTAKES}

local function choose(tenant, basis)
  local ids = call('ZRANGE', BACKLOG .. tenant, 0, basis == '' and 0 or LOOKAHEAD - 1)
  local oldest = ids[1]
  if basis == '' or get(oldest, 'basis') == basis or number(oldest, 'overtaken') >= MAX_OVERTAKES then
    return oldest
  end
  for _, id in ipairs(ids) do
    if get(id, 'basis') == basis then
      call('HINCRBY', JOB .. oldest, 'overtaken', 1)
      return id
    end
  end
  return oldest
end

local function run(id, worker, lease_ms, start)
  local tenant = get(id, 'tenant')
  local charge = number(id, 'cost') / tonumber(call('HGET', SHARES, tenant .. ':weight') or 1)
  call('SET', CLOCK, precise(start))
  call('ZADD', TAGS, precise(start + charge), tenant)
  call('ZADD', RING, precise(start + charge), tenant)
  dequeue(id)
  call('HDEL', JOB .. id, 'overtaken', 'advanced')
  call('HINCRBY', JOB .. id, 'epoch', 1)
  call('HSETNX', JOB .. id, 'started_ms', whole(NOW))
  set(id, 'status', 'running', 'worker', worker, 'charge', precise(charge))
  call('SADD', RUNNING .. tenant, id)
  call('ZADD', LEASES, whole(NOW + lease_ms), id)
  local work = string.sub(id, 1, 6) == 'ftjob-' and 'Training' or 'Building'
  log(id, 'info', work .. ' started (attempt ' .. call('HINCRBY', JOB .. id, 'attempt', 1) .. ')')
end
"""

#: ARGV: worker, limit, lease (ms), preferred basis (or ''), default cap per tenant, token.
#: Reply: per job its lease's deadline (ms) and the job. A repeated token gets the same jobs again.
CLAIM = queue_script(
    _RUN,
    """
local worker, limit, lease_ms, basis, default_cap, token =
  ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5]), ARGV[6]
local ids = {}

local function claim_next()
  local tenant, start = unpack(call('ZRANGE', RING, 0, 0, 'WITHSCORES'))
  if not tenant then return false end
  local cap = tonumber(call('HGET', SHARES, tenant .. ':cap') or default_cap)
  if call('SCARD', RUNNING .. tenant) >= cap then
    call('ZREM', RING, tenant) -- enters again when one of its jobs leaves its worker
    return true
  end
  local id = choose(tenant, basis)
  if get(id, 'tenant') == tenant then
    run(id, worker, lease_ms, tonumber(start))
    ids[#ids + 1] = id
  else -- a record that someone deleted by hand must not stop the queue
    call('ZREM', BACKLOG .. tenant, id)
    call('ZREM', WAITING, id)
    if call('EXISTS', BACKLOG .. tenant) == 0 then call('ZREM', RING, tenant) end
  end
  return true
end

local earlier = call('GET', CLAIM .. worker)
if earlier and string.sub(earlier, 1, #token) == token then
  for id in string.gmatch(string.sub(earlier, #token + 1), '%S+') do
    if get(id, 'status') == 'running' and get(id, 'worker') == worker then ids[#ids + 1] = id end
  end
else
  enqueue_due()
  if call('EXISTS', RING, LEASES) == 0 then call('DEL', TAGS) end -- what was used while nobody waited is free
  while #ids < limit and claim_next() do end
  call('ZREMRANGEBYSCORE', TAGS, '-inf', call('GET', CLOCK) or 0)
  if call('EXISTS', RING) == 0 then call('DEL', DOORBELL) end
  if #ids > 0 then call('SET', CLAIM .. worker, token .. ' ' .. table.concat(ids, ' '), 'PX', lease_ms) end
end

local jobs = {}
for _, id in ipairs(ids) do jobs[#jobs + 1] = {call('ZSCORE', LEASES, id), view(id)} end
return jobs
""",
)

#: Reply: 0 if a claim would find a job now, else ms until the next delayed one is due, -1 if there is none.
NEXT_WORK = queue_script("""
if call('EXISTS', RING) == 1 then return 0 end
local due = call('ZRANGE', DELAYED, 0, 0, 'WITHSCORES')[2]
return due and math.max(0, due - NOW) or -1
""")

# ARGV of every step on a running job begins: job id, epoch, token.
_FENCE = """
local id, epoch, token = ARGV[1], ARGV[2], ARGV[3]
if get(id, 'epoch') ~= epoch then return 'stale' end
if get(id, 'last_op') == token then return 'repeated' end
if get(id, 'status') ~= 'running' then return 'stale' end
set(id, 'last_op', token)
"""

_ASKED = """
local function asked(id)
  return get(id, 'cancel_requested') and 'cancel' or get(id, 'pause_requested') and 'pause' or 'held'
end
"""

# An attempt that comes further than any before it is marked, because its end does not speak against the job.
_ADVANCE = """
local function advance(id, step)
  if step and step > tonumber(get(id, 'best_step') or -1) then
    set(id, 'best_step', whole(step), 'advanced', 1)
  end
end
"""

_LEAVE = """
local function leave_worker(id, returns_charge)
  local tenant, charge = unpack(call('HMGET', JOB .. id, 'tenant', 'charge'))
  call('ZREM', LEASES, id)
  call('SREM', RUNNING .. tenant, id)
  call('HDEL', JOB .. id, 'worker', 'charge', 'overdue_ms')
  local tag = call('ZSCORE', TAGS, tenant)
  if returns_charge and tag then
    call('ZADD', TAGS, precise(tag - charge), tenant)
    call('ZREM', RING, tenant)
  end
  enter_ring(tenant)
end

-- Off the worker, to where the job's owner wants it: cancelled, paused, or queued again.
local function give_back(id, level, message)
  if get(id, 'cancel_requested') then
    leave_worker(id, false)
    return finish(id, 'cancelled', 'info', 'Job cancelled')
  end
  leave_worker(id, true)
  log(id, level, message)
  if get(id, 'pause_requested') then park(id) else enqueue(id) end
end

local function fail(id, problem, message)
  leave_worker(id, false)
  set(id, 'error', problem)
  finish(id, 'failed', 'error', message)
end

local function bury(id, problem, message)
  fail(id, problem, message)
  call('XADD', DEAD, 'MAXLEN', '~', MAX_DEAD, '*', 'job', id, 'tenant', get(id, 'tenant'),
       'attempt', get(id, 'attempt'), 'error', problem)
end
"""

#: ARGV: lease (ms), then job id, epoch of each lease. Reply: held, lost, cancel or pause for each.
RENEW = queue_script(
    _ASKED,
    """
local states = {}
for i = 2, #ARGV, 2 do
  local id, epoch = ARGV[i], ARGV[i + 1]
  if get(id, 'epoch') == epoch and get(id, 'status') == 'running' then
    call('ZADD', LEASES, whole(NOW + ARGV[1]), id)
    call('HDEL', JOB .. id, 'overdue_ms')
    states[#states + 1] = asked(id)
  else
    states[#states + 1] = 'lost'
  end
end
return states
""",
)

#: ARGV: …, level, type ('' for no event), message, data, progress ('' to leave it).
#: The number `step` in the progress says how far the job has come. Reply: held, cancel or pause; or stale.
REPORT = queue_script(
    _ASKED,
    _ADVANCE,
    _FENCE.replace("return 'repeated'", "return asked(id)"),
    """
local level, kind, message, data, progress = unpack(ARGV, 4)
if kind ~= '' then log(id, level, message, kind, data) end
if progress ~= '' then
  set(id, 'progress', progress)
  advance(id, tonumber(cjson.decode(progress).step))
end
return asked(id)
""",
)

#: ARGV: …, bytes ('' deletes), the step after which they were taken ('' if it is not known).
CHECKPOINT = queue_script(
    _ADVANCE,
    _FENCE,
    """
if ARGV[4] == '' then call('DEL', CHECKPOINT .. id) else call('SET', CHECKPOINT .. id, ARGV[4]) end
advance(id, tonumber(ARGV[5]))
return 'done'
""",
)

#: ARGV: …, result. A second completion by the same epoch is a repetition.
COMPLETE = queue_script(
    """
if get(ARGV[1], 'status') == 'succeeded' and get(ARGV[1], 'epoch') == ARGV[2] then return 'repeated' end
""",
    _FENCE,
    _LEAVE,
    """
leave_worker(id, false)
set(id, 'result', ARGV[4])
finish(id, 'succeeded', 'info', 'Job succeeded')
return 'done'
""",
)

#: ARGV: …, error, its message, delay before the next attempt (ms; -1: not retryable), attempts allowed, how
#: many workers it costs. An attempt that came further than those before it counts as the first. Reply: the
#: job's new status.
FAIL = queue_script(
    _FENCE.replace("return 'repeated'", "return get(id, 'status')"),
    _LEAVE,
    """
local problem, message, delay_ms, max_attempts = ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
if get(id, 'advanced') then set(id, 'attempt', 1) end
local attempt = number(id, 'attempt')
if delay_ms < 0 then
  fail(id, problem, 'Job failed: ' .. message)
elseif attempt >= max_attempts and not get(id, 'cancel_requested') then
  bury(id, problem, string.format('Job failed after %d attempts: %s', attempt, message))
else
  set(id, 'due_ms', whole(NOW + delay_ms))
  call('HINCRBY', JOB .. id, 'lost_workers', ARGV[8])
  give_back(id, 'warn', string.format('Attempt %d of %d failed: %s', attempt, max_attempts, message))
end
return get(id, 'status')
""",
)

#: ARGV: …. The attempt does not count.
RELEASE = queue_script(
    _FENCE,
    _LEAVE,
    """
call('HINCRBY', JOB .. id, 'attempt', -1)
give_back(id, 'info', 'Released by its worker')
return 'done'
""",
)

#: ARGV: …. Reply 'unasked' if nobody asked for it.
ACKNOWLEDGE_CANCEL = queue_script(
    """
local status, claimed, cancel = unpack(call('HMGET', JOB .. ARGV[1], 'status', 'epoch', 'cancel_requested'))
if status == 'running' and claimed == ARGV[2] and not cancel then return 'unasked' end
""",
    _FENCE,
    _LEAVE,
    """
give_back(id)
return 'done'
""",
)

#: ARGV: attempts allowed, error of a job given up on, grace (ms). Reply: job id, status, … of the lost
#: leases. With a grace a lease is lost if it is found expired twice, so long apart, without a renewal in
#: between.
REAP = queue_script(
    _LEAVE,
    """
local max_attempts, problem, grace_ms = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
enqueue_due()

local function is_lost(id)
  if grace_ms == 0 or not get(id, 'tenant') then return true end
  call('HSETNX', JOB .. id, 'overdue_ms', whole(NOW))
  return NOW - number(id, 'overdue_ms') >= grace_ms
end

local function take_back(id)
  local attempt = number(id, 'attempt')
  if not get(id, 'tenant') then
    call('ZREM', LEASES, id)
  elseif get(id, 'advanced') then
    set(id, 'attempt', 0)
    call('HINCRBY', JOB .. id, 'lost_workers', 1)
    give_back(id, 'warn', 'Its worker was lost, or too busy to say that it lives, but had made progress: ' ..
                          'the attempt does not count')
  elseif attempt >= max_attempts and not get(id, 'cancel_requested') then
    bury(id, problem, string.format('Job failed: its worker died in each of %d attempts', attempt))
  else
    call('HINCRBY', JOB .. id, 'lost_workers', 1)
    give_back(id, 'warn', string.format('Attempt %d of %d lost its worker', attempt, max_attempts))
  end
end

local reaped = {}
for _, id in ipairs(call('ZRANGEBYSCORE', LEASES, '-inf', whole(NOW), 'LIMIT', 0, MAX_SWEEP)) do
  if is_lost(id) then
    take_back(id)
    reaped[#reaped + 1] = id
    reaped[#reaped + 1] = get(id, 'status') or ''
  end
end

for _, member in ipairs(call('ZRANGEBYSCORE', FINISHED, '-inf', whole(NOW - JOB_TTL_S * 1000),
                             'LIMIT', 0, MAX_SWEEP)) do
  local tenant, id = string.match(member, '^(%S+) (%S+)$')
  call('ZREM', INDEX .. tenant, id)
  call('ZREM', FINISHED, member)
end
return reaped
""",
)
