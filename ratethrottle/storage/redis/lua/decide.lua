--- Decides entries in order; each distinct key is read once and written at most once.
--- KEYS: state_key...
--- ARGV: request mode rule_count entry_count rule... entry...
--- rule: kind capacity window_us unit_ticks drain_ticks slot_us coarse_us
--- entry: key_index rule_index cost
--- reply: request server_us answer...
--- answer: allowed remaining retry_us reset_us
--- limits: keys=128 rules=128 entries=128
-- docs/arithmetic.md specifies every step. Numbers are integers below 2^53, exact in Lua's doubles.
local floor, min, max = math.floor, math.min, math.max
local sub, match, format = string.sub, string.match, string.format
local TICKS, UNITS_MAX = 4503599627370496, 4000000000

local function ceil_div(a, b) return floor((a + b - 1) / b) end

-- Refuses in negated form, since every comparison with NaN is false.
local function number(value, low, high)
  local n = tonumber(value)
  if not (n and n >= low and n <= high and n % 1 == 0) then return nil end
  return n
end

local function slot_end(view, now)
  if view.q == 1 then return now end
  return (floor(now / view.q) + 1) * view.q
end

-- A sliding window has n entries, in ascending order. The newest is kept as `last` (us) and `units`. The others stay where they
-- were read, in `text` from `from` on, 16 digits of us and 10 of units each: only those that leave are ever looked at.
local function at_of(view, i)
  if i == view.n - 1 then return view.last end
  local from = view.from + i * 26
  return tonumber(sub(view.text, from, from + 15))
end

local function units_of(view, i)
  if i == view.n - 1 then return view.units end
  local from = view.from + i * 26
  return tonumber(sub(view.text, from + 16, from + 25))
end

local function push(view, at, units)
  local n = view.n
  if n > 0 and view.last == at then
    local both = min(view.units + units, UNITS_MAX)
    view.total = view.total + both - view.units
    view.units = both
  else
    units = min(units, UNITS_MAX)
    if n > 0 then
      view.text = sub(view.text, view.from, view.from + (n - 1) * 26 - 1) .. format('%016.0f%010.0f', view.last, view.units)
      view.from = 1
    end
    view.n, view.last, view.units, view.total = n + 1, at, units, view.total + units
  end
  if view.q == 1 and view.total > 64 then
    local gone, excess = 0, view.total - 64
    local held = units_of(view, 0)
    while held <= excess do
      excess = excess - held
      gone = gone + 1
      held = units_of(view, gone)
    end
    view.n, view.total, view.from = view.n - gone, 64, view.from + gone * 26
    if excess > 0 and view.n == 1 then
      view.units = 64
    elseif excess > 0 then
      local from = view.from
      view.text = sub(view.text, from, from + 15) .. format('%010.0f', held - excess) .. sub(view.text, from + 26)
      view.from = 1
    end
  end
end

-- Returns the header and up to two views; no header if the state is none of ours.
local function parse(state)
  local head, at = match(state, '^(1[^;]*;)()')
  if not head then return nil end
  local views, size, count = {}, #state, 0
  while at <= size do
    local kind, view = sub(state, at, at), nil
    if kind == 'b' then
      local unit, drain, cap, level, t, after = match(state, '^b(%d+),(%d+),(%d+),(%d+),(%d+);()', at)
      if not after then return nil end
      view = {kind = 'b', unit = tonumber(unit), drain = tonumber(drain), cap = tonumber(cap), level = tonumber(level), t = tonumber(t)}
      if view.unit < 1 or view.drain < 1 then return nil end
      at = after
    elseif kind == 's' then
      local window, q, total, n, after = match(state, '^s(%d+),(%d+),(%d+),(%d+),()', at)
      if not after then return nil end
      n = tonumber(n)
      at = after + n * 26 + 1
      view = {kind = 's', window = tonumber(window), q = tonumber(q), total = tonumber(total), n = n, text = state, from = after, last = 0,
        units = 0, cap = 0}
      if n > 0 then view.last, view.units = tonumber(sub(state, at - 27, at - 12)), tonumber(sub(state, at - 11, at - 2)) end
      if view.window < 1 or view.q < 1 or not view.last or not view.units or sub(state, at - 1, at - 1) ~= ';' then return nil end
    elseif kind == 'f' or kind == 'c' then
      local window, start, cur, prev, after = match(state, '^.(%d+),(%d+),(%d+),?(%d*);()', at)
      if not after or (prev == '') ~= (kind == 'f') then return nil end
      view = {kind = kind, window = tonumber(window), start = tonumber(start), cur = tonumber(cur), prev = tonumber(prev) or 0, cap = 0}
      if view.window < 1 then return nil end
      at = after
    else
      return nil
    end
    count = count + 1
    if count > 2 then return nil end
    views[count] = view
  end
  return head, views[1], views[2]
end

-- In up to three pieces, so that entries are copied once, into the whole.
local function print_view(v)
  local kind = v.kind
  if kind == 'b' then return format('b%.0f,%.0f,%.0f,%.0f,%.0f;', v.unit, v.drain, v.cap, v.level, v.t), '', '' end
  if kind == 's' then
    local n = v.n
    if n == 0 then return format('s%.0f,%.0f,0,0,;', v.window, v.q), '', '' end
    return format('s%.0f,%.0f,%.0f,%.0f,', v.window, v.q, v.total, n), sub(v.text, v.from, v.from + (n - 1) * 26 - 1),
      format('%016.0f%010.0f;', v.last, v.units)
  end
  if kind == 'f' then return format('f%.0f,%.0f,%.0f;', v.window, v.start, v.cur), '', '' end
  return format('c%.0f,%.0f,%.0f,%.0f;', v.window, v.start, v.cur, v.prev), '', ''
end

-- Brings a view to now; true if the clock had stepped backwards. Done again at the same time it changes nothing.
local function roll(v, now)
  local kind = v.kind
  if kind == 'b' then
    local past = now - v.t
    v.t = now
    if past < 0 then return true end
    if past >= ceil_div(v.level, v.drain) then v.level = 0 else v.level = v.level - v.drain * past end
    return false
  elseif kind == 's' then
    local n = v.n
    if n == 0 then return false end
    local rebased, since = false, now - v.window
    if v.last <= since then
      v.n, v.total = 0, 0
      return false
    end
    local head = v.last > now and slot_end(v, now)
    if head and v.last > head then
      rebased = true
      local held = 0
      while n > 0 and at_of(v, n - 1) >= head do
        n = n - 1
        held = held + units_of(v, n)
      end
      v.n, v.last, v.units = n + 1, head, min(held, UNITS_MAX)
      v.total = v.total - held + v.units
    end
    local gone = 0
    while at_of(v, gone) <= since do
      v.total = v.total - units_of(v, gone)
      gone = gone + 1
    end
    v.n, v.from = v.n - gone, v.from + gone * 26
    return rebased
  end
  local start, before = now - now % v.window, v.start
  if before == start then return false end
  v.start = start
  if before > start then return true end
  if kind == 'c' and before == start - v.window then v.prev = v.cur else v.prev = 0 end
  v.cur = 0
  return false
end

-- How long until nothing of a rolled view counts any more; 0 for a fresh one.
local function reset_of(v, now)
  local kind = v.kind
  if kind == 'b' then return ceil_div(v.level, v.drain) end
  if kind == 's' then
    if v.n == 0 then return 0 end
    return v.last + v.window - now
  end
  if v.cur > 0 then return v.start + (kind == 'c' and 2 or 1) * v.window - now end
  if v.prev > 0 then return v.start + v.window - now end
  return 0
end

-- Makes the view of a definition that this state meets for the first time.
local function used_of(v)
  if v.kind == 'b' then return ceil_div(v.level, v.unit) end
  if v.kind == 's' then return v.total end
  return v.cur + v.prev
end

-- From the view that holds most: a definition between the two may have let go, or never have known, what the other one counts.
local function derive(rule, first, second, now)
  local kind, window, source, used = rule.kind, rule.window, first, first and used_of(first) or 0
  if second and used_of(second) > used then source, used = second, used_of(second) end
  if kind == 'b' then
    return {kind = 'b', unit = rule.unit, drain = rule.drain, cap = rule.cap, level = min(used, rule.cap) * rule.unit, t = now}
  elseif kind ~= 's' then
    return {kind = kind, window = window, start = now - now % window, cur = min(used, UNITS_MAX), prev = 0, cap = 0}
  end
  local own = {kind = 's', window = window, q = rule.q, total = 0, n = 0, text = '', from = 1, last = 0, units = 0, cap = 0}
  if used == 0 then return own end
  local head = slot_end(own, now)
  if source.kind ~= 's' then
    push(own, head, used)
    return own
  end
  for i = 0, source.n - 1 do
    local at = min(ceil_div(at_of(source, i), rule.q) * rule.q, head)
    if at + window > now then push(own, at, units_of(source, i)) end
  end
  return own
end

local function same(v, rule)
  local kind = v.kind
  if kind ~= rule.kind then return false end
  if kind == 'b' then return v.unit == rule.unit and v.drain == rule.drain end
  return v.window == rule.window and (kind ~= 's' or v.q == rule.q)
end

-- What a counter has free, in units times its span, and what that was made of.
local function counter(rule, v, now)
  local cap, span = rule.cap, ceil_div(rule.window, rule.coarse)
  local cur, prev = min(v.cur, cap), min(v.prev, cap)
  return (cap - cur) * span - prev * (span - floor((now - v.start) / rule.coarse)), span, cur, prev
end

-- Returns allowed and retry.
local function judge(rule, v, now, cost)
  local cap, kind = rule.cap, rule.kind
  if cost > cap then return false, -1 end
  if kind == 'b' then
    local short = v.level + cost * v.unit - cap * v.unit
    if short <= 0 then return true, 0 end
    return false, ceil_div(short, v.drain)
  elseif kind == 's' then
    local excess, i = v.total + cost - cap, 0
    if excess <= 0 then return true, 0 end
    while true do
      excess = excess - units_of(v, i)
      if excess <= 0 then return false, at_of(v, i) + v.window - now end
      i = i + 1
    end
  elseif kind == 'f' then
    if v.cur + cost <= cap then return true, 0 end
    return false, v.start + v.window - now
  end
  local free, span, cur, prev = counter(rule, v, now)
  if cost * span <= free then return true, 0 end
  local room = cap - cur - cost
  if room >= 0 then
    local steps = span - floor(room * span / prev)
    return false, v.start + (steps < span and steps * rule.coarse or v.window) - now
  end
  local steps = max(0, span - floor((cap - cost) * span / cur))
  return false, v.start + v.window + min(steps * rule.coarse, v.window) - now
end

local function remaining_of(rule, v, now)
  local kind = rule.kind
  if kind == 'b' then return floor(max(0, rule.cap * v.unit - v.level) / v.unit) end
  if kind == 's' then return max(0, rule.cap - v.total) end
  if kind == 'f' then return max(0, rule.cap - v.cur) end
  local free, span = counter(rule, v, now)
  return floor(max(0, free) / span)
end

local function charge(v, now, cost)
  local kind = v.kind
  if kind == 'b' then
    v.level = v.level + cost * v.unit
  elseif kind == 's' then
    -- The newest entry, while ahead of now, is that of the slot we are in.
    push(v, v.n > 0 and v.last > now and v.last or slot_end(v, now), cost)
  else
    v.cur = min(v.cur + cost, UNITS_MAX)
  end
end

-- Everything is checked before anything is written: a refused call leaves every key as it is.
local function refuse(what) return redis.error_reply('RATETHROTTLE ' .. what) end
local KEYS, ARGV = KEYS, ARGV
local request, mode, key_count = ARGV[1], ARGV[2], #KEYS
local rule_count, entry_count = number(ARGV[3], 1, 128), number(ARGV[4], 1, 128)
if not request or request == '' then return refuse('no request id') end
if mode ~= 'check' and mode ~= 'peek' then return refuse('mode is check or peek') end
if not (rule_count and entry_count) then return refuse('the counts of rules and entries are from 1 to 128') end
if not (key_count >= 1 and key_count <= 128) then return refuse('the count of keys is from 1 to 128') end
if #ARGV ~= 4 + 7 * rule_count + 3 * entry_count then return refuse('the number of arguments is wrong') end
if key_count > 1 then
  local seen = {}
  for k = 1, key_count do
    if seen[KEYS[k]] then return refuse('a key is given twice') end
    seen[KEYS[k]] = true
  end
end
local rules, entries, at = {}, {}, 4
for r = 1, rule_count do
  local kind = ARGV[at + 1]
  local cap, window = number(ARGV[at + 2], 1, 1000000000), number(ARGV[at + 3], 1000, 31622400000000)
  if not (cap and window) then return refuse('a number of a rule is out of range') end
  -- What a kind doesn't have is '0', to the letter.
  local unit, drain, q, coarse = ARGV[at + 4], ARGV[at + 5], ARGV[at + 6], ARGV[at + 7]
  local fits = false
  if kind == 'b' then
    unit, drain = number(unit, 1, TICKS), number(drain, 1, 1000000000)
    fits = unit and drain and cap * unit < TICKS and q == '0' and coarse == '0'
  elseif kind == 's' then
    q = number(q, 1, window)
    fits = q and ((q == 1 and cap <= 64) or q == ceil_div(window, 64)) and unit == '0' and drain == '0' and coarse == '0'
  elseif kind == 'c' then
    coarse = number(coarse, 1, window)
    fits = coarse and cap * ceil_div(window, coarse) < TICKS and unit == '0' and drain == '0' and q == '0'
  elseif kind == 'f' then
    fits = unit == '0' and drain == '0' and q == '0' and coarse == '0'
  end
  if not fits then return refuse('a rule does not fit its kind') end
  rules[r] = {kind = kind, cap = cap, window = window, unit = unit, drain = drain, q = q, coarse = coarse}
  at = at + 7
end
for i = 1, 3 * entry_count, 3 do
  local key, rule, cost = number(ARGV[at + i], 1, key_count), number(ARGV[at + i + 1], 1, rule_count), number(ARGV[at + i + 2], 1, 1000000000)
  if not (key and rule and cost) then return refuse('a number of an entry is out of range') end
  entries[i], entries[i + 1], entries[i + 2] = key, rule, cost
end

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local stored = redis.call('MGET', unpack(KEYS))
-- By key: the header of the state, its two views, and whether it is to be written.
local heads, firsts, seconds, written = {}, {}, {}, {}
for k = 1, key_count do
  local head, first, second = '1;', nil, nil
  if stored[k] then
    head, first, second = parse(stored[k])
    if not head then return refuse('a key holds a state that is not of this version') end
  end
  heads[k], firsts[k], seconds[k] = head, first, second
end

local reply, filled = {request, now, 0, 0, 0, 0}, 2
for i = 1, 3 * entry_count, 3 do
  local k, rule, cost = entries[i], rules[entries[i + 1]], entries[i + 2]
  local first, second, own, other = firsts[k], seconds[k], nil, nil
  local changed = false
  if first then
    changed = roll(first, now)
    if second and roll(second, now) then changed = true end
    if same(first, rule) then own, other = first, second
    elseif second and same(second, rule) then own, other = second, first
    else other = first end
  end
  if not own then
    own = derive(rule, first, second, now)
    if reset_of(own, now) > 0 then changed = true end
  end
  local allowed, retry = judge(rule, own, now, cost)
  if mode == 'check' and (allowed or changed) then
    if allowed then
      charge(own, now, cost)
      own.cap = rule.cap
      if other and other.kind == 'b' then
        -- A definition never owes more than its capacity for what another one admitted.
        other.level = min(other.level + min(cost, other.cap) * other.unit, max(other.level, other.cap * other.unit))
      elseif other then
        charge(other, now, cost)
      end
    end
    firsts[k], seconds[k], written[k] = own, other, true
  end
  reply[filled + 1] = allowed and 1 or 0
  reply[filled + 2] = remaining_of(rule, own, now)
  reply[filled + 3] = retry
  reply[filled + 4] = reset_of(own, now)
  filled = filled + 4
end

for k = 1, key_count do
  if written[k] then
    local own, other = firsts[k], seconds[k]
    local reset = reset_of(own, now)
    if other then reset = max(reset, reset_of(other, now)) end
    if reset == 0 then
      redis.call('DEL', KEYS[k])
    else
      local fields, entries_text, ending = print_view(own)
      local text
      if other then
        local other_fields, other_entries, other_ending = print_view(other)
        text = heads[k] .. fields .. entries_text .. ending .. other_fields .. other_entries .. other_ending
      else
        text = heads[k] .. fields .. entries_text .. ending
      end
      redis.call('SET', KEYS[k], text, 'PX', format('%.0f', ceil_div(reset, 1000) + 1))
    end
  end
end
return reply
