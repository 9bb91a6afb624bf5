"""The atomic steps of the queue's worker side. The shared Lua is in `client_scripts.py`.

Each claim raises the epoch of its job by one, and every step on a running job names the epoch. A step with an
older epoch changes nothing and gets the reply 'stale'. The reply 'repeated' means that this very step was
carried out before.
"""

from __future__ import annotations

from tessera.queue.client_scripts import queue_script

#: A worker that has a basis loaded prefers jobs on this basis, among this many of the tenant's oldest jobs.
LOOKAHEAD = 16
#: No job is overtaken more often than this by later jobs of its own tenant.
MAX_OVERTAKES = 8

_RUN = f"""
local LOOKAHEAD, MAX_OVERTAKES = {LOOKAHEAD}, {MAX_OVERTAKES}

-- The tenant's job to run next: its oldest, or one on the worker's basis.
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

-- Lease the job to the worker. start: the virtual time of the tenant.
local function run(id, worker, lease_ms, start)
  -- Charge the tenant: its next job starts later by cost / weight.
  local tenant = get(id, 'tenant')
  local charge = number(id, 'cost') / tonumber(call('HGET', SHARES, tenant .. ':weight') or 1)
  call('SET', CLOCK, precise(start))
  call('ZADD', TAGS, precise(start + charge), tenant)
  call('ZADD', RING, precise(start + charge), tenant)
  -- Move the job from the queue to the running ones, under a new epoch.
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
#: Reply: for each job the deadline of its lease (ms) and the job. A repeated token gets the same jobs again.
CLAIM = queue_script(
    _RUN,
    """
local worker, limit, lease_ms, basis, default_cap, token =
  ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5]), ARGV[6]
local ids = {}

-- Claim a job of the tenant with the lowest virtual time. Returns false if no tenant is left.
local function claim_next()
  local tenant, start = unpack(call('ZRANGE', RING, 0, 0, 'WITHSCORES'))
  if not tenant then return false end
  local cap = tonumber(call('HGET', SHARES, tenant .. ':cap') or default_cap)
  if call('SCARD', RUNNING .. tenant) >= cap then
    -- The tenant is at its cap. It enters the ring again when one of its jobs leaves its worker.
    call('ZREM', RING, tenant)
    return true
  end
  local id = choose(tenant, basis)
  if get(id, 'tenant') == tenant then
    run(id, worker, lease_ms, tonumber(start))
    ids[#ids + 1] = id
  else
    -- Someone has deleted the record by hand; that must not stop the queue.
    call('ZREM', BACKLOG .. tenant, id)
    call('ZREM', WAITING, id)
    if call('EXISTS', BACKLOG .. tenant) == 0 then call('ZREM', RING, tenant) end
  end
  return true
end

-- A repeated claim gets the jobs of the first that this worker still holds.
local earlier = call('GET', CLAIM .. worker)
if earlier and string.sub(earlier, 1, #token) == token then
  for id in string.gmatch(string.sub(earlier, #token + 1), '%S+') do
    if get(id, 'status') == 'running' and get(id, 'worker') == worker then ids[#ids + 1] = id end
  end
else
  enqueue_due()
  -- With no job waiting or running, all tenants start equal again.
  if call('EXISTS', RING, LEASES) == 0 then call('DEL', TAGS) end
  while #ids < limit and claim_next() do end
  -- Forget tags that the clock has passed, and silence the doorbell if nothing is left to claim.
  call('ZREMRANGEBYSCORE', TAGS, '-inf', call('GET', CLOCK) or 0)
  if call('EXISTS', RING) == 0 then call('DEL', DOORBELL) end
  if #ids > 0 then call('SET', CLAIM .. worker, token .. ' ' .. table.concat(ids, ' '), 'PX', lease_ms) end
end

local jobs = {}
for _, id in ipairs(ids) do jobs[#jobs + 1] = {call('ZSCORE', LEASES, id), view(id)} end
return jobs
""",
)

#: Reply: 0 if a claim would find a job now; else ms until the next delayed job is due, or -1 if there is
#: none.
NEXT_WORK = queue_script("""
if call('EXISTS', RING) == 1 then return 0 end
local due = call('ZRANGE', DELAYED, 0, 0, 'WITHSCORES')[2]
return due and math.max(0, due - NOW) or -1
""")

# ARGV of every step on a running job begins with job id, epoch, token. "…" below stands for these three.
_FENCE = """
local id, epoch, token = ARGV[1], ARGV[2], ARGV[3]
if get(id, 'epoch') ~= epoch then return 'stale' end
if get(id, 'last_op') == token then return 'repeated' end
if get(id, 'status') ~= 'running' then return 'stale' end
set(id, 'last_op', token)
"""

_ASKED = """
-- What the owner of the job wants of its worker.
local function asked(id)
  return get(id, 'cancel_requested') and 'cancel' or get(id, 'stop_requested') and 'stop'
         or get(id, 'pause_requested') and 'pause' or 'held'
end
"""

_ADVANCE = """
-- Mark an attempt that comes further than all earlier ones: its failure does not count against the job.
local function advance(id, step)
  if step and step > tonumber(get(id, 'best_step') or -1) then
    set(id, 'best_step', whole(step), 'advanced', 1)
  end
end
"""

_LEAVE = """
-- End the lease. returns_charge: the tenant gets its share back, because the job will run again.
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

-- Take the job from its worker to where its owner wants it: cancelled, paused, or queued again.
local function give_back(id, level, message)
  if get(id, 'cancel_requested') then
    leave_worker(id, false)
    return finish(id, 'cancelled', 'info', 'Job cancelled')
  end
  leave_worker(id, true)
  log(id, level, message)
  if get(id, 'pause_requested') then park(id) else enqueue(id) end
end

-- End the job as failed.
local function fail(id, problem, message)
  leave_worker(id, false)
  set(id, 'error', problem)
  finish(id, 'failed', 'error', message)
end

-- End the job as failed after its last attempt, and note it among the dead jobs.
local function bury(id, problem, message)
  fail(id, problem, message)
  call('XADD', DEAD, 'MAXLEN', '~', MAX_DEAD, '*', 'job', id, 'tenant', get(id, 'tenant'),
       'attempt', get(id, 'attempt'), 'error', problem)
end
"""

#: ARGV: lease (ms), then job id and epoch of each lease. Reply: for each 'held', 'lost', 'cancel',
#: 'stop' or 'pause'.
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

#: ARGV: …, level, type ('' for no event), message, data, progress ('' to leave it as it is).
#: The number `step` in the progress says how far the job has come. Reply: 'held', 'cancel', 'stop',
#: 'pause' or 'stale'.
REPORT = queue_script(
    _ASKED,
    _ADVANCE,
    _FENCE.replace("return 'repeated'", "return asked(id)"),
    """
local level, kind, message, data, progress = unpack(ARGV, 4)
if kind ~= '' then log(id, level, message, kind, data) end
if progress ~= '' then
  set(id, 'progress', progress, 'progress_ms', whole(NOW))
  advance(id, tonumber(cjson.decode(progress).step))
end
return asked(id)
""",
)

#: ARGV: …, bytes ('' deletes the checkpoint), the step after which they were taken ('' if unknown).
CHECKPOINT = queue_script(
    _ADVANCE,
    _FENCE,
    """
if ARGV[4] == '' then call('DEL', CHECKPOINT .. id) else call('SET', CHECKPOINT .. id, ARGV[4]) end
advance(id, tonumber(ARGV[5]))
return 'done'
""",
)

#: ARGV: …, result, progress ('' to leave it as it is). A second completion with the same epoch counts as a
#: repetition.
COMPLETE = queue_script(
    """
if get(ARGV[1], 'status') == 'succeeded' and get(ARGV[1], 'epoch') == ARGV[2] then return 'repeated' end
""",
    _FENCE,
    _LEAVE,
    """
leave_worker(id, false)
set(id, 'result', ARGV[4])
if ARGV[5] ~= '' then set(id, 'progress', ARGV[5], 'progress_ms', whole(NOW)) end
finish(id, 'succeeded', 'info', 'Job succeeded')
return 'done'
""",
)

#: ARGV: …, error, its message, delay before the next attempt (ms; -1: not retryable), attempts allowed,
#: number of workers lost by it. Reply: the new status of the job.
FAIL = queue_script(
    _FENCE.replace("return 'repeated'", "return get(id, 'status')"),
    _LEAVE,
    """
local problem, message, delay_ms, max_attempts = ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
-- An attempt that came further than all before it counts as the first one.
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

#: ARGV: …
#: The attempt does not count.
RELEASE = queue_script(
    _FENCE,
    _LEAVE,
    """
call('HINCRBY', JOB .. id, 'attempt', -1)
give_back(id, 'info', 'Released by its worker')
return 'done'
""",
)

#: ARGV: …. Reply: 'done', or 'unasked' if nobody asked for a cancellation.
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

#: ARGV: attempts allowed, error of a job that is given up, grace (ms). Reply: job id, status, … of the lost
#: leases. With a grace, a lease is lost if it is found expired twice, at least that long apart, without a
#: renewal in between.
REAP = queue_script(
    _LEAVE,
    """
local max_attempts, problem, grace_ms = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
enqueue_due()

-- Note when the lease was first found expired. Returns whether its grace is over.
local function note_overdue(id)
  if grace_ms == 0 or not get(id, 'tenant') then return true end
  call('HSETNX', JOB .. id, 'overdue_ms', whole(NOW))
  return NOW - number(id, 'overdue_ms') >= grace_ms
end

-- Take the job from its lost worker, and queue it again unless it has no attempt left.
local function take_back(id)
  local attempt = number(id, 'attempt')
  if not get(id, 'tenant') then
    call('ZREM', LEASES, id)
  elseif get(id, 'advanced') then
    set(id, 'attempt', 0)
    call('HINCRBY', JOB .. id, 'lost_workers', 1)
    give_back(id, 'warn', 'The worker was lost, or too busy to renew its lease, but had made progress: ' ..
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
  if note_overdue(id) then
    take_back(id)
    reaped[#reaped + 1] = id
    reaped[#reaped + 1] = get(id, 'status') or ''
  end
end

-- Drop expired jobs from the lists of their tenants.
for _, member in ipairs(call('ZRANGEBYSCORE', FINISHED, '-inf', whole(NOW - JOB_TTL_S * 1000),
                             'LIMIT', 0, MAX_SWEEP)) do
  local tenant, id = string.match(member, '^(%S+) (%S+)$')
  call('ZREM', INDEX .. tenant, id)
  call('ZREM', FINISHED, member)
end
return reaped
""",
)
