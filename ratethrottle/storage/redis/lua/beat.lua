--- Names the epoch, and counts the processes that are there.
--- KEYS: epoch_key processes_key
--- ARGV: request run known_epoch process_id leaves statistics others_in_us
--- reply: request server_us epoch learning_began learning_us processes rank evicted_keys
-- An epoch is one run of one server over one data set. Its key holds the server's run id (40 characters), E (16 digits: its name, us,
-- always greater than those before it) and M (16 digits: by when processes begin to tell what they knew of before, by this server's
-- clock; 0 while nobody is known to know of anything). docs/arithmetic.md specifies it under "Repair". `others_in_us`: when others
-- may try to connect that found nobody a moment ago; they begin to tell then.
-- Without a process_id nobody is counted, and the numbers of processes and rank are 0: so somebody looks who was counted only just.
local LEARN_US, REPAIR_US, LAPSE_US, OTHERS_US = 250000, 10000000, 3000000, 1000000
local max, match, format, call = math.max, string.match, string.format, redis.call
local KEYS, ARGV, refuse = KEYS, ARGV, redis.error_reply
local request, run, known, process, leaves = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local others_in = tonumber(ARGV[7])
if not request or request == '' then return refuse('RATETHROTTLE no request id') end
if #KEYS ~= 2 or #ARGV ~= 7 then return refuse('RATETHROTTLE the number of keys or arguments is wrong') end
if #run ~= 40 or match(run, '%W') then return refuse('RATETHROTTLE a run is 40 letters and digits') end
if not (known and known >= 0 and known < 9999999999999999 and known % 1 == 0) then return refuse('RATETHROTTLE the epoch is none') end
if leaves ~= '0' and leaves ~= '1' then return refuse('RATETHROTTLE a process leaves or not') end
if not (others_in and others_in >= 0 and others_in <= OTHERS_US and others_in % 1 == 0) then
  return refuse('RATETHROTTLE others come in 1 s at most')
end

local clock = call('TIME')
local now = clock[1] * 1000000 + clock[2]
-- MGET takes what is no text for absent, where GET would fail for ever.
local value = call('MGET', KEYS[1])[1] or ''
local theirs, epoch, began = match(value, '^(%w+)(%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d)(%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d)$')
local before = value
if not theirs or #value ~= 72 then
  epoch, began = max(now, known + 1), known > 0 and now + others_in or 0
elseif theirs ~= run or known > epoch + 0 then
  -- Or a process comes from a later epoch to a server that has seen nothing of it.
  epoch, began = max(now, epoch + 1, known + 1), now + others_in
else
  epoch, began = epoch + 0, began + 0
  -- A process that knew an older epoch comes to one that was taken for the first: what was granted meanwhile counts as since.
  if known > 0 and known < epoch and began == 0 and now - epoch < REPAIR_US then began = now + others_in end
end
value = run .. format('%016.0f%016.0f', epoch, began)
if value ~= before then call('SET', KEYS[1], value) end

local members, rank = 0, 0
if process ~= '' then
  local place = KEYS[2]
  if call('TYPE', place).ok ~= 'zset' then call('DEL', place) end
  if leaves == '1' then
    call('ZREM', place, process)
  else
    call('ZADD', place, format('%.0f', now), process)
  end
  call('ZREMRANGEBYSCORE', place, '-inf', format('(%.0f', now - LAPSE_US))
  call('ZREMRANGEBYSCORE', place, format('(%.0f', now + LAPSE_US), '+inf')
  call('PEXPIRE', place, format('%.0f', LAPSE_US / 1000))
  local all = call('ZRANGE', place, 0, -1)
  members = #all
  for i = 1, members do
    if all[i] < process then rank = rank + 1 end
  end
end
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
