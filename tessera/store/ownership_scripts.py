"""The atomic steps of bases that belong to tenants (`ownership.py`), as Lua scripts.

A tenant's hash maps a basis id to "<bytes>:<token>". The token names one life of this ownership, so that the
end of an earlier life, delayed, does not end the next one. Bytes 0: the factors are about to be deleted.
"""

from __future__ import annotations

from tessera.redis.client import Script

_NOTE_USER = """
local function note_user(users, name, deletion_count)
  local known = tonumber(redis.call('HGET', users, name) or -1)
  if known < tonumber(deletion_count) then
    redis.call('HSET', users, name, deletion_count)
  end
end
"""

# KEYS: the tenant's bases, the users of this one, the tenant's recipes. ARGV: basis id, bytes, limit, new
# token, id of the quota reserved for it or "", a user or "", its deletion count, the names of the basis'
# recipe. Reply: the token in force, or the bytes owned already as a number if the limit forbids it. A recipe
# is named in the same step, so that whoever finds no basis of it finds the room for one not taken by it, and
# the recipes of bases that are gone are forgotten.
RESERVE = Script(
    _NOTE_USER
    + """
local owned, limit = redis.call('HGETALL', KEYS[1]), tonumber(ARGV[3])
local total, token = 0, nil
for i = 1, #owned, 2 do
  local bytes, life = string.match(owned[i + 1], '^(%d+):(.*)$')
  if owned[i] == ARGV[1] and bytes ~= '0' then
    token = life
  end
  if owned[i] ~= ARGV[5] then
    total = total + tonumber(bytes)
  end
end
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

# KEYS: the tenant's bases, the users of this one. ARGV: basis id, user, deletion count. Reply: 1, 0 if the
# tenant does not own it.
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

# KEYS: the tenant's bases, the users of this one. ARGV: basis id, user, deletion count. Reply: the token of
# the life that ends, false if it goes on or there is none. An adapter that was published again since has
# another deletion count, and keeps the basis.
RELEASE = Script("""
local owned = redis.call('HGET', KEYS[1], ARGV[1])
if not owned then
  return false
end
local known = redis.call('HGET', KEYS[2], ARGV[2])
if not known and string.sub(owned, 1, 2) ~= '0:' then
  return false
end
if known and tonumber(known) < tonumber(ARGV[3]) then
  redis.call('HDEL', KEYS[2], ARGV[2])
end
if redis.call('HLEN', KEYS[2]) > 0 then
  return false
end
local token = string.match(owned, '^%d+:(.*)$')
redis.call('HSET', KEYS[1], ARGV[1], '0:' .. token)
return token
""")

# KEYS: the tenant's bases, the users of this one. ARGV: basis id, the user that does not count. Reply: the
# token of the life that ends, "" if there is none, false if it goes on because somebody else uses it.
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

# KEYS: the tenant's bases. ARGV: basis id, token.
FORGET = Script("""
if redis.call('HGET', KEYS[1], ARGV[1]) == '0:' .. ARGV[2] then
  redis.call('HDEL', KEYS[1], ARGV[1])
end
return 1
""")

# KEYS: the basis' owners, its manifest. ARGV: tenant, token. Reply: 1, 0 if it is stored and everybody's.
OWN = Script("""
if redis.call('EXISTS', KEYS[2]) == 1 then
  if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('HEXISTS', KEYS[1], '*') == 1 then
    return 0
  end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
""")

# KEYS: the basis' owners, what is written. ARGV: tenant, token, the values. Reply: 1, 0 if that life is over:
# what a late writer wrote then would belong to nobody, and so to everybody.
WRITE = Script("""
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
for i = 2, #KEYS do
  redis.call('SET', KEYS[i], ARGV[i + 1])
end
return 1
""")

# KEYS: the basis' owners, manifest, preconditioner, step, every module. ARGV: tenant, token.
DISOWN = Script("""
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('HDEL', KEYS[1], ARGV[1])
if redis.call('EXISTS', KEYS[1]) == 0 then
  for i = 2, #KEYS do
    redis.call('UNLINK', KEYS[i])
  end
end
return 1
""")
