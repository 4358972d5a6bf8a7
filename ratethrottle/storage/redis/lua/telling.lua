-- Which processes still have something to tell of older epochs. The loader puts this in front of the scripts that need it.
-- `<epoch_key>:telling` is the sorted set of these processes by level: each has told all that it knows of that server time (of the epoch
-- before, us) and later. `<epoch_key>:heard` has when each of them was heard of last (us), and, by names that no process has,
-- what else is known of them: `=known`, the epoch that the first of them knew; `=mixed`, whether others knew another one; and `=held`,
-- two numbers of 16 digits, that epoch and until when all of it was kept.
local UNTOLD, TELLS_LAPSE_US, TELLS_EXPIRE_MS = 9007199254740991, 3000000, 60000

-- Returns W: the processes have told all that they know of that server time or later; 0 once they have told all.
local function untold(epoch_key, now)
  local telling, heard = epoch_key .. ':telling', epoch_key .. ':heard'
  for _ = 1, 16 do
    local top = redis.call('ZREVRANGE', telling, 0, 0, 'WITHSCORES')
    if not top[1] then return 0 end
    local past = now - (tonumber(redis.call('HGET', heard, top[1]) or 0) or 0)
    if past < TELLS_LAPSE_US and past > -TELLS_LAPSE_US then
      -- Times of two servers say nothing of each other.
      return redis.call('HGET', heard, '=mixed') and UNTOLD or tonumber(top[2])
    end
    -- Nothing waits for a process that has ended, or stands still, for longer than it is counted.
    redis.call('ZREM', telling, top[1])
  end
  return UNTOLD
end

-- Takes note of how far a process has come.
local function tells(epoch_key, process, level, now)
  local telling, heard = epoch_key .. ':telling', epoch_key .. ':heard'
  if level > 0 then
    redis.call('ZADD', telling, string.format('%.0f', level), process)
  else
    redis.call('ZREM', telling, process)
  end
  redis.call('HSET', heard, process, string.format('%.0f', now))
  redis.call('PEXPIRE', telling, TELLS_EXPIRE_MS)
  redis.call('PEXPIRE', heard, TELLS_EXPIRE_MS)
end
