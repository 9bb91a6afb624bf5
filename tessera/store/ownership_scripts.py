"""The atomic steps on private bases (`ownership.py`), as Lua scripts.

A tenant's hash maps a basis id to "<bytes>:<token>". The token identifies one lifetime of this ownership, so
that a delayed end of an earlier lifetime does not end the next one. The bytes are 0 while the factors are
being deleted. The users of a basis are a hash from a name (an adapter, a job, a pin) to a deletion count.
"""

from __future__ import annotations

from tessera.redis.client import Script

_NOTE_USER = """
-- Add a user of the basis, or raise its deletion count; a late, lower count changes nothing.
local function note_user(users, name, deletion_count)
  local known = tonumber(redis.call('HGET', users, name) or -1)
  if known < tonumber(deletion_count) then
    redis.call('HSET', users, name, deletion_count)
  end
end
"""

# KEYS: the tenant's bases, the users of this one, the tenant's recipes
# ARGV: basis id, bytes, limit, new token, id of the quota reserved for it or "", a user or "", its deletion
#       count, then the recipe keys of the basis
# Reply: the token in force; or, as a number, the bytes owned already, if the limit forbids the basis
RESERVE = Script(
    _NOTE_USER
    + """
-- Add up what the tenant owns, without the quota that was reserved for this basis.
local owned, limit = redis.call('HGETALL', KEYS[1]), tonumber(ARGV[3])
local total, token = 0, nil
for i = 1, #owned, 2 do
  local bytes, life = string.match(owned[i + 1], '^(%d+):(.*)$')
  -- The tenant owns the basis already: its lifetime goes on.
  if owned[i] == ARGV[1] and bytes ~= '0' then
    token = life
  end
  if owned[i] ~= ARGV[5] then
    total = total + tonumber(bytes)
  end
end

-- Otherwise start a new lifetime, if the limit allows it.
if not token then
  if total + tonumber(ARGV[2]) > limit then
    return total
  end
  token = ARGV[4]
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ':' .. token)
end

if ARGV[6] ~= '' then
  note_user(KEYS[2], ARGV[6], ARGV[7])
end

-- Name the recipe in this same step: a process that finds no basis of the recipe must also find that no quota
-- has been charged for one. Forget the recipes of bases that are gone.
if #ARGV > 7 then
  local known = redis.call('HGETALL', KEYS[3])
  for i = 1, #known, 2 do
    local value = redis.call('HGET', KEYS[1], known[i + 1])
    if not value or string.sub(value, 1, 2) == '0:' then
      redis.call('HDEL', KEYS[3], known[i])
    end
  end
  for i = 8, #ARGV do
    redis.call('HSET', KEYS[3], ARGV[i], ARGV[1])
  end
end
return token
"""
)

# KEYS: the tenant's bases, the users of this one. ARGV: basis id, user, deletion count
# Reply: 1, or 0 if the tenant does not own the basis
USE = Script(
    _NOTE_USER
    + """
local owned = redis.call('HGET', KEYS[1], ARGV[1])
if not owned or string.sub(owned, 1, 2) == '0:' then
  return 0
end
note_user(KEYS[2], ARGV[2], ARGV[3])
return 1
"""
)

# KEYS: the tenant's bases, the users of this one. ARGV: basis id, user, deletion count
# Reply: the token of the lifetime that ends; false if it goes on, or there is none
RELEASE = Script("""
local owned = redis.call('HGET', KEYS[1], ARGV[1])
if not owned then
  return false
end

-- Not a user of this basis: there is nothing to do, unless an earlier deletion was interrupted.
local known = redis.call('HGET', KEYS[2], ARGV[2])
if not known and string.sub(owned, 1, 2) ~= '0:' then
  return false
end

-- Remove the user, unless it has been published again since: then its deletion count is higher.
if known and tonumber(known) < tonumber(ARGV[3]) then
  redis.call('HDEL', KEYS[2], ARGV[2])
end
if redis.call('HLEN', KEYS[2]) > 0 then
  return false
end

-- That was the last user: end the lifetime.
local token = string.match(owned, '^%d+:(.*)$')
redis.call('HSET', KEYS[1], ARGV[1], '0:' .. token)
return token
""")

# KEYS: the tenant's bases, the users of this one. ARGV: basis id, the one user that does not count
# Reply: the token of the lifetime that ends; "" if there is none; false if another user keeps it alive
END = Script("""
local owned = redis.call('HGET', KEYS[1], ARGV[1])
if not owned then
  return ''
end
if redis.call('HLEN', KEYS[2]) > redis.call('HEXISTS', KEYS[2], ARGV[2]) then
  return false
end
redis.call('HDEL', KEYS[2], ARGV[2])
local token = string.match(owned, '^%d+:(.*)$')
redis.call('HSET', KEYS[1], ARGV[1], '0:' .. token)
return token
""")

# KEYS: the tenant's bases. ARGV: basis id, token
FORGET = Script("""
-- Only the lifetime that ended: the tenant may own the basis again by now.
if redis.call('HGET', KEYS[1], ARGV[1]) == '0:' .. ARGV[2] then
  redis.call('HDEL', KEYS[1], ARGV[1])
end
return 1
""")

# KEYS: the basis' owners, its manifest. ARGV: tenant, token
# Reply: 1, or 0 if the basis is stored and shared
OWN = Script("""
-- A stored basis without owners, or owned by "*", is shared.
if redis.call('EXISTS', KEYS[2]) == 1 then
  if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('HEXISTS', KEYS[1], '*') == 1 then
    return 0
  end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
""")

# KEYS: the basis' owners, the keys to write. ARGV: tenant, token, the values
# Reply: 1, or 0 if that lifetime is over
WRITE = Script("""
-- After the end of the lifetime, factors written late would have no owner, and so would be shared.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
for i = 2, #KEYS do
  redis.call('SET', KEYS[i], ARGV[i + 1])
end
return 1
""")

# KEYS: the basis' owners, manifest, preconditioner, step, every module. ARGV: tenant, token
# Reply: 1, or 0 if the tenant does not own this lifetime of the basis
DISOWN = Script("""
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('HDEL', KEYS[1], ARGV[1])
-- The last owner takes the factors with it.
if redis.call('EXISTS', KEYS[1]) == 0 then
  for i = 2, #KEYS do
    redis.call('UNLINK', KEYS[i])
  end
end
return 1
""")
