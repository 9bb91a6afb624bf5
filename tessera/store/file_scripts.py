"""The atomic steps on uploaded files (`files.py`), as Lua scripts."""

from __future__ import annotations

from tessera.redis.client import Script

# KEYS: content. ARGV: offset, piece, lifetime in s. Reply: 1, or 0 if the earlier pieces have expired
WRITE_PIECE = Script("""
-- SETRANGE alone would fill the place of expired pieces with zeros.
if redis.call('STRLEN', KEYS[1]) < tonumber(ARGV[1]) then
  return 0
end
redis.call('SETRANGE', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
""")

# KEYS: record, content, index. ARGV: file id, created_at, bytes, when it expires in Unix seconds or "", then
# the fields of the record. Reply: 1, or 0 if the content has expired
FINISH = Script("""
local record, content, index = KEYS[1], KEYS[2], KEYS[3]
-- All bytes must still be there.
if redis.call('STRLEN', content) ~= tonumber(ARGV[3]) then
  return 0
end
-- Keep the content for good, or until the file expires with its record.
redis.call('PERSIST', content)
redis.call('HSET', record, unpack(ARGV, 5))
if ARGV[4] ~= '' then
  redis.call('EXPIREAT', content, ARGV[4])
  redis.call('EXPIREAT', record, ARGV[4])
end
-- Only now is the file listed.
redis.call('ZADD', index, ARGV[2], ARGV[1])
return 1
""")

# KEYS: record, content, index. ARGV: file id. Reply: the number of records deleted, 0 or 1
DELETE = Script("""
redis.call('UNLINK', KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[1])
return redis.call('DEL', KEYS[1])
""")

# KEYS: index. ARGV: the file id to continue after or "", how many, "asc" or "desc"
# Reply: ids, or nil if there is no such file id
PAGE = Script("""
-- The commands of sorted sets have a second form for the reverse order: ZREVRANK, ZREVRANGE.
local back = ARGV[3] == 'desc' and 'REV' or ''
local first = 0
if ARGV[1] ~= '' then
  local rank = redis.call('Z' .. back .. 'RANK', KEYS[1], ARGV[1])
  if not rank then
    return false
  end
  first = rank + 1
end
return redis.call('Z' .. back .. 'RANGE', KEYS[1], first, first + ARGV[2] - 1)
""")
