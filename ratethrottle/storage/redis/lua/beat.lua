--- Names the epoch, and counts the processes that are there.
--- KEYS: epoch_key processes_key layout_key
--- ARGV: request run known_epoch process_id purpose statistics known_processes heard_us layout
--- reply: request server_us epoch learning_began learning_us processes rank evicted_keys forgets held_us slot whole_us
-- An epoch is one run of one server over one data set. Its key holds the server's run id (40 characters), E (16 digits: its name, us,
-- always greater than those before it) and M (16 digits: by when all processes have come that knew something before, by this
-- server's clock; 0 while no process is known to know anything). docs/arithmetic.md specifies it under "Repair". While
-- states are repaired, there may be 17 digits more, of which calls needn't know: 1 if what isn't of this epoch was cleared, and W, which
-- telling.lua describes. `<epoch_key>:cleared` holds E of the last clear: a process from an earlier epoch has to forget (1) what it knows.
-- `<epoch_key>:written` holds E, and until when, by this server's clock, the data that holds this key has all that processes told. A process
-- that comes with heard_us, the server's time when it heard of that epoch last (0: never), needn't tell what is older than held_us (0: all).
-- purpose: `count` (the process), `leave`, `look`, if it was counted only just, or `clear`, to begin an epoch without a past.
-- known_processes: how many shared the limits in the epoch that it knows, 0 if it wasn't one of them, 10^9 if that isn't sure. A
-- process that isn't counted hears 0 for the number of processes and its rank, and -1 for its slot.
-- Each process has a slot: a bit in four maps. processes_key is a sorted set of process ids by slot, and the other keys begin with its
-- name: `:marks` (it has come in this period), `:last` and `:before` (in the two before it), `:alive` (it is counted: in any of them),
-- and `:count`, five numbers: when this period began, how many are counted, when that set has changed last (16, 8 and 16 digits), while
-- some are waited for how many are (10 digits), and since when processes have been counted without a gap (16 digits), of which whole_us
-- tells the time that has passed: while that is short, processes that live may not be counted yet.
-- docs/arithmetic.md has it under "Counting".
-- heard_us may be left out, and so may layout_key and layout. The first process with a layout has it written down. One with another
-- layout is refused: the two would call one key by two names.
local LEARN_US, REPAIR_US, PERIOD_US, OTHERS_US, YEAR_US = 250000, 10000000, 900000, 500000, 31622400000000
local EACH_US, WRITTEN_US = 100, 50000
local max, min, floor, match, format = math.max, math.min, math.floor, string.match, string.format
local find, sub, call = string.find, string.sub, redis.call
local KEYS, ARGV, refuse = KEYS, ARGV, redis.error_reply
local request, run, known, process, purpose = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local processes = tonumber(ARGV[7])
if not request or request == '' then return refuse('RATETHROTTLE no request id') end
if not (#KEYS == 2 and (#ARGV == 7 or #ARGV == 8) or #KEYS == 3 and #ARGV == 9) then
  return refuse('RATETHROTTLE the number of keys or arguments is wrong')
end
if #run ~= 40 or match(run, '%W') then return refuse('RATETHROTTLE a run is 40 letters and digits') end
if not (known and known >= 0 and known <= 9999999999999999 and known % 1 == 0) then return refuse('RATETHROTTLE the epoch is malformed') end
if process == '' then return refuse('RATETHROTTLE no process id') end
if purpose ~= 'count' and purpose ~= 'look' and purpose ~= 'leave' and purpose ~= 'clear' then
  return refuse('RATETHROTTLE a process is counted, looks, leaves or clears')
end
if not (processes and processes >= 0 and processes % 1 == 0) then return refuse('RATETHROTTLE the number of processes is malformed') end

if KEYS[3] and not match(ARGV[9], '^tags=%d+,parts=%d+$') then return refuse('RATETHROTTLE the layout is malformed') end
local heard_us = tonumber(ARGV[8] or 0)
if not (heard_us and heard_us >= 0 and heard_us <= 9007199254740991 and heard_us % 1 == 0) then
  return refuse('RATETHROTTLE the time is malformed')
end

local place = KEYS[2]
local marks, last, before, alive, head = place .. ':marks', place .. ':last', place .. ':before', place .. ':alive', place .. ':count'
local clock = call('TIME')
local now = clock[1] * 1000000 + clock[2]
-- MGET takes what is no text for absent, where GET would fail for ever.
local found = call('MGET', KEYS[1], head, KEYS[1] .. ':cleared', KEYS[3] or head, KEYS[1] .. ':written')
if KEYS[3] then
  local layout = found[4] or ''
  if not match(layout, '^tags=%d+,parts=%d+$') then
    call('SET', KEYS[3], ARGV[9])
  elseif layout ~= ARGV[9] then
    return refuse('RATETHROTTLE layout ' .. layout .. ' is in use, not ' .. ARGV[9])
  end
end
local stood, suffix = found[1] or '', ''
local value = stood
if #value == 89 and not find(value, '%D', 73) then value, suffix = sub(value, 1, 72), sub(value, 73) end
local theirs, epoch, began = match(value, '^(%w+)(%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d)(%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d)$')
-- No clock is set so far ahead: what stands there, or what a process heard, comes from damage. It heals, and keeps no process out: such
-- a process counts as one that knew something.
if known > now + YEAR_US then known = 1 end
-- A process that has to forget has nothing to tell either.
local learns, forgets = false, known > 0 and known < (tonumber(found[3] or 0) or 0)
if forgets then known = 0 end
local named = theirs and #value == 72 and epoch
if not theirs or #value ~= 72 or epoch + 0 > now + YEAR_US then
  epoch, began, learns = max(now, known + 1), 0, known > 0
elseif theirs ~= run or known > epoch + 0 then
  -- Or a process comes from a later epoch to a server that has seen nothing of it.
  epoch, learns = max(now, epoch + 1, known + 1), true
else
  epoch, began = epoch + 0, began + 0
  -- A process that knew an older epoch comes to one that seemed to be the first: what was granted meanwhile counts as since.
  learns = known > 0 and known < epoch and began == 0 and now - epoch < REPAIR_US
end
if purpose == 'clear' then
  epoch, began, learns, suffix = max(now, epoch + 1), 0, false, '1' .. format('%016.0f', 0)
  call('SET', KEYS[1] .. ':cleared', format('%.0f', epoch))
end
local telling, heard = KEYS[1] .. ':telling', KEYS[1] .. ':heard'
local written = match(found[5] or '', '^%d+$') and #found[5] == 32 and found[5]
if learns or purpose == 'clear' then
  call('DEL', telling, heard)
  suffix = learns and '' or suffix
  if learns and written and sub(written, 1, 16) == named then call('HSET', heard, '=held', written) end
end
if learns then
  -- A process that found no other one a moment ago comes at its next turn. Until then only those are counted that have something to tell.
  began = now + OTHERS_US
end

local comes, waits = known > 0 and known < epoch and processes > 0, began > now and began <= now + OTHERS_US
local members, rank, slot, expected, whole = 0, 0, -1, 0, 0

local function forget()
  call('DEL', place, marks, last, before, alive, head)
  found[2] = false
end

-- Has all that counts processes expire, and notes what `count` has found.
local function keep(lapse_us, swept, changed, since)
  local lapse = format('%.0f', lapse_us / 1000)
  call('PEXPIRE', place, lapse)
  call('PEXPIRE', marks, lapse)
  call('PEXPIRE', last, lapse)
  call('PEXPIRE', before, lapse)
  call('PEXPIRE', alive, lapse)
  -- Last, so that the next beat does what this one may not: a user without one of these commands is refused each time.
  call('SET', head, format('%016.0f%08.0f%016.0f%010.0f%016.0f', swept, members, changed, expected, since), 'PX', lapse)
end

-- Counts the process, or no longer. Its cost doesn't depend on how many there are, but for a few bits of each, read by Redis itself.
local function count()
  local text = found[2]
  local swept, changed, since, written = 0, 0, now, true
  if text and #text == 66 and not match(text, '%D') then
    swept, members, changed = sub(text, 1, 16) + 0, sub(text, 17, 24) + 0, sub(text, 25, 40) + 0
    expected, since, written = sub(text, 41, 50) + 0, sub(text, 51, 66) + 0, false
  elseif text then
    forget()
  end
  local period = max(PERIOD_US, members * EACH_US)
  local past = now - swept
  if past >= period or past < 0 then
    -- The period is over. If all are late, or the clock was set, several may be.
    local stand = call('GET', alive)
    if past < 0 or past >= 2 * period then since = now end
    for _ = 1, past < 0 and 1 or min(3, floor(past / period)) do
      call('BITOP', 'OR', before, last)
      call('BITOP', 'OR', last, marks)
      call('DEL', marks)
    end
    call('BITOP', 'OR', alive, last, before)
    if call('GET', alive) ~= stand then changed = max(now, changed + 1) end
    -- Here already, so that it expires whichever process marks it.
    call('SETRANGE', marks, 0, '\0')
    swept, written = now, true
  end
  local own = call('ZSCORE', place, process)
  if purpose == 'leave' then
    if own then
      call('ZREM', place, process)
      call('SETBIT', marks, own, 0)
      call('SETBIT', last, own, 0)
      call('SETBIT', before, own, 0)
      if call('SETBIT', alive, own, 0) == 1 then changed, written = max(now, changed + 1), true end
    end
  elseif own or comes or not waits then
    if not own then
      -- The first slot that no counted process has. The process that had it isn't counted any more, and takes another one when it comes again.
      own = call('BITPOS', alive, 0)
      call('ZREMRANGEBYSCORE', place, own, own)
      call('ZADD', place, own, process)
    end
    slot = own + 0
    call('SETBIT', marks, slot, 1)
    if call('SETBIT', alive, slot, 1) == 0 then changed, written = max(now, changed + 1), true end
    rank = slot > 0 and call('BITCOUNT', alive, 0, slot - 1, 'BIT') or 0
  end
  if written then members = call('BITCOUNT', alive) end
  if comes and waits and processes > expected then expected, written = processes, true end
  -- As many have come as were known.
  if comes and waits and members >= expected then began = now end
  if began <= now and expected > 0 then expected, written = 0, true end
  whole = max(0, now - since)
  if written then keep(4 * period, swept, changed, since) end
end

if learns then forget() end
if purpose ~= 'look' and purpose ~= 'clear' or comes then
  if not pcall(count) then
    -- A key of ours is of another type, or there is no room, which is said then.
    forget()
    members, rank, slot, expected, whole = 0, 0, -1, 0, 0
    count()
  end
  if slot < 0 then members, rank, whole = 0, 0, 0 end
end

-- How far the processes have come that tell what they knew before. What is older is taken for absent only for so long.
local held_us, in_time, cleared = 0, now - (began > 0 and began or epoch) < REPAIR_US, sub(suffix, 1, 1) == '1'
local function hear()
  local level = 0
  if known > 0 and known < epoch then
    local held = call('HGET', heard, '=held')
    if held and sub(held, 1, 16) + 0 == known then held_us = sub(held, 17) + 0 end
    -- Another connection of its may have come first.
    if in_time and heard_us > 0 and purpose ~= 'leave' and call('HSETNX', heard, process, format('%.0f', now)) == 1 then
      local first = call('HGET', heard, '=known')
      if not first then
        call('HSET', heard, '=known', format('%.0f', known))
      elseif first + 0 ~= known then
        call('HSET', heard, '=mixed', '1')
      end
      tells(KEYS[1], process, heard_us + 1, now)
      suffix = '0'
    end
  end
  if purpose == 'leave' then call('ZREM', telling, process) end
  if suffix ~= '' then level = untold(KEYS[1], now) end
  return level
end
local fine, level = pcall(hear)
if not fine then
  call('DEL', telling, heard)
  fine, level = pcall(hear)
end
level = fine and level or 0
cleared = cleared and in_time
suffix = (cleared or level > 0) and (cleared and '1' or '0') .. format('%016.0f', level) or ''
-- Also for processes that go from here to another server: not too often.
if not written or sub(written, 1, 16) + 0 ~= epoch or now - sub(written, 17) >= WRITTEN_US or now < sub(written, 17) + 0 then
  call('SET', KEYS[1] .. ':written', format('%016.0f%016.0f', epoch, now))
end
value = run .. format('%016.0f%016.0f', epoch, began) .. suffix
if value ~= stood then call('SET', KEYS[1], value) end

-- Unless the clock was set back by more than that.
local learning = began > 0 and began <= now + OTHERS_US and max(0, began + LEARN_US - now) or 0
-- A Redis that evicts keys forgets what was used, without a word. To ask costs several times as much as all the rest, so
-- it is only done now and then. fakeredis has no INFO.
local evicted = -1
if ARGV[6] == '1' then
  local heard, stats = pcall(call, 'INFO', 'stats')
  evicted = heard and type(stats) == 'string' and match(stats, 'evicted_keys:(%d+)') or 0
end
return {request, now, epoch, began, learning, members, rank, evicted + 0, forgets and 1 or 0, held_us, slot, whole}
