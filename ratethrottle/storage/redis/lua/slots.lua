--- Keeps who holds slots of a key, and who waits for one; grants slots in the order in which processes came.
--- KEYS: epoch_key holders_key state_key...
--- ARGV: request mode epoch holder_count holder... item...
--- holder: holder_id previous_id ttl_us holder_bits
--- holder_bits: joins=1 tells=2
--- item: holder_number limit cost held wanted sequence item_bits
--- item_bits: kept=1 waits=2
--- reply: request server_us holder_answer... item_answer...
--- holder_answer: standing
--- item_answer: granted free again_us
--- unreadable: -2
--- unsure: -3
--- old: -4
--- lapsed: -5
--- forgotten: -6
--- limits: keys=128 holders=64
-- docs/arithmetic.md specifies it under "Slots". A holder is a process, under one ttl: holders_key is a sorted set of holders by when they lapse
-- (us). `hold` renews each holder that is named. One that isn't there, or has lapsed, is lost (standing 0), unless it `joins` just now.
-- `standing` is 2 if a key of the holder was forgotten since it was asked last, else 1. An item is of one key, the one at its place: the
-- holder has `held` units there, in all, and would like `wanted` times `cost` more. Whatever the limit, `held` is taken down. It is `kept` if
-- Redis has confirmed some of it: then it is `forgotten` if nothing of it is there. An item with an older sequence than one before is `old`.
-- Where it is one of these, `lapsed` or `unreadable`, nothing is written. `unsure`: nobody is granted anything while others may still tell what
-- they hold; `held` is taken down. A holder that `tells` has more to tell; one that has told all doesn't need the holder any more that it
-- was before (previous_id), whose units and place an item takes over.
-- `waits`: the holder comes again in again_us (0: nothing to wait for), and keeps its place until then.
-- `leave` gives up all that the holders have. `forget` forgets who holds the keys, or waits; its items are empty, and it has no holders.
-- A state is '1e', the epoch, and ';', then `h` id,units,sequence; of each holder (with a 0 of units, and asked_us behind) and `q` id,cost,since_us,asked_us; of each that waits, in order.
local LEARN_US, OTHERS_US, TELLS_US, TTL_MAX_US = 250000, 500000, 3000000, 86400000000
local PLACE_US, SOON_US, FIRST_US, LAST_US, NOTHING_US, NOTHINGS_MAX = 1000000, 25000, 250000, 500000, 60000000, 512
local KEPT_MS, EMPTY_MS, HOLDERS_MS = 7200000, '60000', '172800000'
local UNREADABLE, UNSURE, OLD, LAPSED, FORGOTTEN = -2, -3, -4, -5, -6
local KEYS, ARGV, refuse = KEYS, ARGV, redis.error_reply
local request, mode, key_count, holder_count = ARGV[1], ARGV[2], #KEYS - 2, number(ARGV[4], 0, 64)
if not request or request == '' then return refuse('RATETHROTTLE no request id') end
if mode ~= 'hold' and mode ~= 'leave' and mode ~= 'forget' then return refuse('RATETHROTTLE mode is hold, leave or forget') end
if not (key_count >= 0 and key_count <= 128) then return refuse('RATETHROTTLE the count of keys is from 0 to 128') end
if not holder_count or (holder_count == 0) ~= (mode == 'forget') then return refuse('RATETHROTTLE the count of holders is from 1 to 64') end
if mode == 'leave' and key_count > 0 then return refuse('RATETHROTTLE a holder leaves without keys') end
if #ARGV ~= 4 + 4 * holder_count + (mode == 'hold' and 7 * key_count or 0) then
  return refuse('RATETHROTTLE the number of arguments is wrong')
end

local holders, items, seen, at = {}, {}, {}, 4
for i = 1, holder_count do
  local holder = {id = ARGV[at + 1], previous = ARGV[at + 2], ttl = number(ARGV[at + 3], 1000000, TTL_MAX_US)}
  local bits = number(ARGV[at + 4], 0, 3)
  if not match(holder.id, '^%x+$') or #holder.id > 32 or match(holder.previous, '%X') then
    return refuse('RATETHROTTLE the id of a holder is malformed')
  end
  if not (holder.ttl and bits) then return refuse('RATETHROTTLE a number of a holder is out of range') end
  holder.joins, holder.tells = bits % 2 == 1, bits >= 2
  holders[i], at = holder, at + 4
end
for k = 1, key_count do
  if seen[KEYS[k + 2]] then return refuse('RATETHROTTLE a key is given twice') end
  seen[KEYS[k + 2]] = true
  if mode == 'hold' then
    local holder, bits = number(ARGV[at + 1], 1, holder_count), number(ARGV[at + 7], 0, 3)
    local item = {
      holder = holders[holder], limit = number(ARGV[at + 2], 0, 1000000000), cost = number(ARGV[at + 3], 1, 1000000000),
      held = number(ARGV[at + 4], 0, UNITS_MAX), wanted = number(ARGV[at + 5], 0, 1000000), sequence = number(ARGV[at + 6], 1, 9007199254740991),
    }
    if not (holder and bits and item.limit and item.cost and item.held and item.wanted and item.sequence) then
      return refuse('RATETHROTTLE a number of an item is out of range')
    end
    item.kept, item.waits = bits % 2 == 1, bits >= 2
    items[k], at = item, at + 7
  end
end

local entered = enter(states, ARGV[3])
if entered == nil then return {request, -1} end
if not entered then return refuse('RATETHROTTLE the epoch is malformed') end
local place = KEYS[2]
local telling, resets, lapses = place .. ':telling', place .. ':forgotten', {}

-- Whether a holder has not lapsed.
local function lives(id)
  local until_us = lapses[id]
  if not until_us then
    until_us = tonumber(call('ZSCORE', place, id) or 0)
    -- The clock was set back since. That keeps nothing for longer than a ttl may be.
    if until_us > now + TTL_MAX_US then
      until_us = now + TTL_MAX_US
      call('ZADD', place, format('%d', until_us), id)
    end
    lapses[id] = until_us
  end
  return until_us > now
end

-- Returns who holds how much of a key, and who waits, as lists; nil if that can't be read.
local function read_slots(state)
  local held, queue, from = {}, {}, 20
  if not state then return held, queue end
  if not match(state, '^1e%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d;') then return nil end
  while from <= #state do
    local id, units, sequence, asked, after = match(state, '^h(%x+),(%d+),(%d+),?(%d*);()', from)
    if id then
      held[#held + 1] = {id = id, units = units + 0, sequence = sequence + 0, asked = tonumber(asked) or 0}
    else
      local cost, since
      id, cost, since, asked, after = match(state, '^q(%x+),(%d+),(%d+),(%d+);()', from)
      if not id then return nil end
      queue[#queue + 1] = {id = id, cost = cost + 0, since = since + 0, asked = asked + 0}
    end
    from = after
  end
  return held, queue
end

local function write_slots(key, held, queue, ttl)
  local text, count, nothings = {'1e', epoch, ';'}, 0, 0
  for _, one in ipairs(held) do
    if one.units == 0 then nothings = nothings + 1 end
  end
  for _, one in ipairs(held) do
    count = count + one.units
    -- They stand in the order in which they were written.
    local left_out = one.units == 0 and nothings > NOTHINGS_MAX
    if left_out then nothings = nothings - 1 end
    text[#text + 1] = left_out and '' or 'h' .. one.id .. format(one.units > 0 and ',%d,%d;' or ',%d,%d,%d;', one.units, one.sequence, one.asked)
  end
  for _, one in ipairs(queue) do
    text[#text + 1] = 'q' .. one.id .. format(',%d,%d,%d;', one.cost, one.since, one.asked)
  end
  -- A holder of nothing stays for a minute, as an item may come late that was asked before: the last 512.
  local expiry_ms = count > 0 and format('%d', max(call('PTTL', key), KEPT_MS + floor(ttl / 1000))) or EMPTY_MS
  call('PSETEX', key, expiry_ms, table.concat(text))
end

local reply = {request, now}
if mode == 'forget' then
  for k = 3, key_count + 2 do
    for _, one in ipairs(states[k] and read_slots(states[k]) or {}) do
      if one.units > 0 and lives(one.id) then
        call('SADD', resets, one.id)
        call('PEXPIRE', resets, HOLDERS_MS)
      end
    end
    call('DEL', KEYS[k])
  end
  return reply
end

for i, holder in ipairs(holders) do
  local standing = 1
  if mode == 'leave' then
    call('ZREM', place, holder.id)
    call('ZREM', telling, holder.id)
  elseif holder.joins or lives(holder.id) then
    lapses[holder.id] = now + holder.ttl
    call('ZADD', place, format('%d', now + holder.ttl), holder.id)
    if holder.tells then
      call('ZADD', telling, format('%d', now), holder.id)
      call('PEXPIRE', telling, EMPTY_MS)
    else
      call('ZREM', telling, holder.id)
    end
    if call('SREM', resets, holder.id) == 1 then standing = 2 end
  else
    standing = 0
  end
  if holder.previous ~= '' and standing > 0 and (mode == 'leave' or not holder.tells) then
    call('ZREM', place, holder.previous)
    lapses[holder.previous] = 0
  end
  reply[i + 2] = standing
end
call('ZREMRANGEBYSCORE', place, '-inf', format('%d', now))
call('PEXPIRE', place, HOLDERS_MS)
if key_count == 0 then return reply end

-- How long nobody is granted anything: until all that knew of an epoch before have come, and told what they hold.
local began, unsure_us = sub(ARGV[3], 57) + 0, 0
if began > 0 and began <= now + OTHERS_US then unsure_us = max(0, began + LEARN_US - now) end
if unsure_us == 0 and #call('ZRANGEBYSCORE', telling, '(' .. format('%d', now - TELLS_US), format('%d', now + OTHERS_US), 'LIMIT', 0, 1) > 0 then
  unsure_us = SOON_US
end

-- Takes down what a holder has, and grants what there is. Returns the answer.
local function ask(key, state, item)
  local holder, limit, cost, wanted = item.holder, item.limit, item.cost, item.wanted
  local held, queue = read_slots(state)
  if not held then return UNREADABLE, 0, 0 end
  local own, others, staying, waiting = nil, 0, {}, {}
  for _, one in ipairs(held) do
    if one.id == holder.id then
      own = one
    elseif one.id ~= holder.previous and lives(one.id) and (one.units > 0 or math.abs(now - one.asked) < NOTHING_US) then
      others = others + one.units
      staying[#staying + 1] = one
    end
  end
  if not lives(holder.id) then return LAPSED, max(0, limit - others), 0 end
  if own and item.sequence < own.sequence then return OLD, max(0, limit - others - own.units), 0 end
  if item.kept and not (own and own.units > 0) then return FORGOTTEN, max(0, limit - others), 0 end

  local ahead, mine, granted = 0, nil, 0
  for _, one in ipairs(queue) do
    if one.id == holder.id or one.id == holder.previous then
      if not mine then
        mine, one.id = one, holder.id
        waiting[#waiting + 1] = one
      end
    elseif lives(one.id) and math.abs(now - one.asked) < PLACE_US then
      if not mine then ahead = ahead + 1 end
      waiting[#waiting + 1] = one
    end
  end
  if ahead == 0 and unsure_us == 0 then
    granted = max(0, min(wanted, floor((limit - others - item.held) / cost)))
  end
  -- A holder that was granted something, or gives up its place, makes room for the next one; it has its turn again behind all others.
  local stays = wanted > granted and item.waits and cost <= limit
  if mine and (granted > 0 or not stays) then
    for i, one in ipairs(waiting) do
      if one == mine then table.remove(waiting, i) break end
    end
    mine, ahead = nil, #waiting
  end
  if stays and not mine then
    mine, ahead = {id = holder.id, since = now}, #waiting
    waiting[#waiting + 1] = mine
  end
  local again_us = 0
  if stays then
    mine.cost, mine.asked = cost, now
    if unsure_us > 0 then
      again_us = unsure_us
    elseif others > 0 or ahead > 0 then
      again_us = min(LAST_US, (ahead + 1) * max(SOON_US, min(FIRST_US, floor((now - mine.since) / 16))))
    else
      -- Nobody else can give anything back: it comes only to keep its place.
      again_us = LAST_US
    end
  end
  staying[#staying + 1] = {id = holder.id, units = item.held + granted * cost, sequence = item.sequence, asked = now}
  write_slots(key, staying, waiting, holder.ttl)
  return unsure_us > 0 and wanted > 0 and UNSURE or granted, max(0, limit - others - item.held - granted * cost), again_us
end

at = holder_count + 2
for k = 1, key_count do
  reply[at + 1], reply[at + 2], reply[at + 3] = ask(KEYS[k + 2], states[k + 2], items[k])
  at = at + 3
end
return reply
