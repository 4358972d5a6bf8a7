--- Names the epoch, and counts the processes that are there.
--- KEYS: epoch_key processes_key
--- ARGV: request run known_epoch process_id purpose statistics known_processes
--- reply: request server_us epoch learning_began learning_us processes rank evicted_keys
-- An epoch is one run of one server over one data set. Its key holds the server's run id (40 characters), E (16 digits: its name, us,
-- always greater than those before it) and M (16 digits: by when all have come who have to tell what they knew of before, by this
-- server's clock; 0 while nobody is known to know of anything). docs/arithmetic.md specifies it under "Repair".
-- purpose: `count` (the process), `leave`, or `look`, if it was counted only just. known_processes: how many shared the limits in the
-- epoch that it knows, 0 if it wasn't one of them, 10^9 if that isn't sure. Who isn't counted hears 0 for the number of processes and its rank.
-- The set of processes has another member while some are waited for: '=' and the largest of those numbers.
local LEARN_US, REPAIR_US, LAPSE_US, OTHERS_US = 250000, 10000000, 3000000, 500000
local max, match, format, call = math.max, string.match, string.format, redis.call
local KEYS, ARGV, refuse = KEYS, ARGV, redis.error_reply
local request, run, known, process, purpose = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local processes = tonumber(ARGV[7])
if not request or request == '' then return refuse('RATETHROTTLE no request id') end
if #KEYS ~= 2 or #ARGV ~= 7 then return refuse('RATETHROTTLE the number of keys or arguments is wrong') end
if #run ~= 40 or match(run, '%W') then return refuse('RATETHROTTLE a run is 40 letters and digits') end
if not (known and known >= 0 and known < 9999999999999999 and known % 1 == 0) then return refuse('RATETHROTTLE the epoch is none') end
if process == '' then return refuse('RATETHROTTLE no process id') end
if purpose ~= 'count' and purpose ~= 'look' and purpose ~= 'leave' then
  return refuse('RATETHROTTLE a process is counted, looks or leaves')
end
if not (processes and processes >= 0 and processes % 1 == 0) then return refuse('RATETHROTTLE the number of processes is none') end

local clock = call('TIME')
local now = clock[1] * 1000000 + clock[2]
-- MGET takes what is no text for absent, where GET would fail for ever.
local value = call('MGET', KEYS[1])[1] or ''
local theirs, epoch, began = match(value, '^(%w+)(%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d)(%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d)$')
local before, place = value, KEYS[2]
if call('TYPE', place).ok ~= 'zset' then call('DEL', place) end
local learns = false
if not theirs or #value ~= 72 then
  epoch, began, learns = max(now, known + 1), 0, known > 0
elseif theirs ~= run or known > epoch + 0 then
  -- Or a process comes from a later epoch to a server that has seen nothing of it.
  epoch, learns = max(now, epoch + 1, known + 1), true
else
  epoch, began = epoch + 0, began + 0
  -- A process that knew an older epoch comes to one that was taken for the first: what was granted meanwhile counts as since.
  learns = known > 0 and known < epoch and began == 0 and now - epoch < REPAIR_US
end
if learns then
  -- Who found nobody a moment ago comes at its next turn. Until then only those are counted that have something to tell.
  began = now + OTHERS_US
  call('DEL', place)
end

local comes, waits = known > 0 and known < epoch and processes > 0, began > now and began <= now + OTHERS_US
local members, rank, expected = 0, 0, 0
if purpose ~= 'look' or comes then
  if purpose == 'leave' then
    call('ZREM', place, process)
  elseif comes or not waits then
    call('ZADD', place, format('%.0f', now), process)
  else
    call('ZADD', place, 'XX', format('%.0f', now), process)
  end
  call('ZREMRANGEBYSCORE', place, '-inf', format('(%.0f', now - LAPSE_US))
  call('ZREMRANGEBYSCORE', place, format('(%.0f', now + LAPSE_US), '+inf')
  call('PEXPIRE', place, format('%.0f', LAPSE_US / 1000))
  local all, counted = call('ZRANGE', place, 0, -1), false
  for i = 1, #all do
    local number = match(all[i], '^=(%d+)$')
    if number then
      expected = number + 0
    else
      members = members + 1
      counted = counted or all[i] == process
      if all[i] < process then rank = rank + 1 end
    end
  end
  if comes and waits and processes > expected then
    call('ZREM', place, format('=%.0f', expected))
    call('ZADD', place, format('%.0f', now), format('=%.0f', processes))
    expected = processes
  end
  -- As many have come as were known.
  if comes and waits and members >= expected then began = now end
  if began <= now and expected > 0 then call('ZREM', place, format('=%.0f', expected)) end
  if not counted then members, rank = 0, 0 end
end
value = run .. format('%016.0f%016.0f', epoch, began)
if value ~= before then call('SET', KEYS[1], value) end

-- Unless the clock was set back by more than that.
local learning = began > 0 and began <= now + OTHERS_US and max(0, began + LEARN_US - now) or 0
-- Who runs Redis with eviction loses what was used, without a word from Redis. To ask costs several times as much as all the rest, so
-- it is only done now and then. fakeredis has no INFO.
local evicted = -1
if ARGV[6] == '1' then
  local heard, stats = pcall(call, 'INFO', 'stats')
  evicted = heard and type(stats) == 'string' and match(stats, 'evicted_keys:(%d+)') or 0
end
return {request, now, epoch, began, learning, members, rank, evicted + 0}
