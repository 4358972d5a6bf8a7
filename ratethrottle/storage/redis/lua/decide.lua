--- Decides n entries in order, each distinct key read once and written at most once.
--- KEYS: the distinct state keys, 1 to 128
--- ARGV: request mode rules entries, then 7 numbers a rule, then 3 numbers an entry
--- rule: kind capacity window_us unit_ticks drain_ticks slot_us coarse_us
--- entry: key_index rule_index cost
--- reply: request server_us, then allowed remaining retry_us reset_us for each entry
-- docs/arithmetic.md specifies every step. Numbers are integers below 2^53, exact in Lua's doubles.
local floor, min, max = math.floor, math.min, math.max
local sub, match, format = string.sub, string.match, string.format
local TICKS, UNITS_MAX = 4503599627370496, 4000000000

local function text(n) return format('%.0f', n) end
local function ceil_div(a, b) return floor((a + b - 1) / b) end

local function number(value, low, high)
  local n = tonumber(value)
  if not (n and n >= low and n <= high and n == floor(n)) then return nil end
  return n
end

local function slot_end(view, now)
  if view.q == 1 then return now end
  return (floor(now / view.q) + 1) * view.q
end

-- A sliding window keeps its entries as text and reads only those that it must: 16 digits of us, 10 of units.
local function at_of(view, i) return tonumber(sub(view.text, i * 26 + 1, i * 26 + 16)) end
local function units_of(view, i) return tonumber(sub(view.text, i * 26 + 17, i * 26 + 26)) end

local function drop(view, n, units)
  view.text = sub(view.text, n * 26 + 1)
  view.n = view.n - n
  view.total = view.total - units
end

local function push(view, at, units)
  units = min(units, UNITS_MAX)
  local last = view.n - 1
  if last >= 0 and at_of(view, last) == at then
    local before = units_of(view, last)
    units = min(units, UNITS_MAX - before)
    view.text = sub(view.text, 1, -11) .. format('%010.0f', before + units)
  else
    view.text = view.text .. format('%016.0f%010.0f', at, units)
    view.n = view.n + 1
  end
  view.total = view.total + units
  if view.q == 1 and view.total > 64 then
    local n, excess, gone = 0, view.total - 64, 0
    while true do
      local held = units_of(view, n)
      if held > excess - gone then
        local rest = excess - gone
        local at_text = sub(view.text, n * 26 + 1, n * 26 + 16)
        drop(view, n + 1, gone + rest)
        view.text = at_text .. format('%010.0f', held - rest) .. view.text
        view.n = view.n + 1
        return
      end
      gone = gone + held
      n = n + 1
      if gone == excess then drop(view, n, gone) return end
    end
  end
end

local function parse(state)
  local head, rest = match(state, '^(1[^;]*;)(.*)$')
  if not head then return nil end
  local views = {}
  while rest ~= '' do
    local kind, a, b, c, d, e, after
    kind = sub(rest, 1, 1)
    if kind == 'b' then
      a, b, c, d, e, after = match(rest, '^b(%d+),(%d+),(%d+),(%d+),(%d+);(.*)$')
      if not a then return nil end
      views[#views + 1] = {kind = kind, unit = tonumber(a), drain = tonumber(b), cap = tonumber(c), level = tonumber(d), t = tonumber(e)}
    elseif kind == 'f' then
      a, b, c, after = match(rest, '^f(%d+),(%d+),(%d+);(.*)$')
      if not a then return nil end
      views[#views + 1] = {kind = kind, window = tonumber(a), start = tonumber(b), cur = tonumber(c), prev = 0}
    elseif kind == 'c' then
      a, b, c, d, after = match(rest, '^c(%d+),(%d+),(%d+),(%d+);(.*)$')
      if not a then return nil end
      views[#views + 1] = {kind = kind, window = tonumber(a), start = tonumber(b), cur = tonumber(c), prev = tonumber(d)}
    elseif kind == 's' then
      a, b, c, d, e, after = match(rest, '^s(%d+),(%d+),(%d+),(%d+),(%d*);(.*)$')
      if not a or #e ~= d * 26 then return nil end
      views[#views + 1] = {kind = kind, window = tonumber(a), q = tonumber(b), total = tonumber(c), n = tonumber(d), text = e}
    else
      return nil
    end
    rest = after
  end
  return head, views
end

local function print_view(v)
  if v.kind == 'b' then
    return 'b' .. text(v.unit) .. ',' .. text(v.drain) .. ',' .. text(v.cap) .. ',' .. text(v.level) .. ',' .. text(v.t) .. ';'
  elseif v.kind == 'f' then
    return 'f' .. text(v.window) .. ',' .. text(v.start) .. ',' .. text(v.cur) .. ';'
  elseif v.kind == 'c' then
    return 'c' .. text(v.window) .. ',' .. text(v.start) .. ',' .. text(v.cur) .. ',' .. text(v.prev) .. ';'
  end
  return 's' .. text(v.window) .. ',' .. text(v.q) .. ',' .. text(v.total) .. ',' .. text(v.n) .. ',' .. v.text .. ';'
end

-- Brings a view to now, in a copy of this call's own; true if the clock had stepped backwards.
local function roll(v, now)
  if v.kind == 'b' then
    local t = v.t
    v.t = now
    if t > now then return true end
    if now - t >= ceil_div(v.level, v.drain) then v.level = 0 else v.level = v.level - v.drain * (now - t) end
    return false
  elseif v.kind == 's' then
    local rebased, held, n = false, 0, v.n
    local head = slot_end(v, now)
    if n > 0 and at_of(v, n - 1) > head then
      rebased = true
      while n > 0 and at_of(v, n - 1) >= head do
        n = n - 1
        held = held + units_of(v, n)
      end
      v.text = sub(v.text, 1, n * 26) .. format('%016.0f%010.0f', head, min(held, UNITS_MAX))
      v.n = n + 1
      v.total = v.total - held + min(held, UNITS_MAX)
    end
    local gone, since, units = 0, now - v.window, 0
    while gone < v.n and at_of(v, gone) <= since do
      units = units + units_of(v, gone)
      gone = gone + 1
    end
    if gone > 0 then drop(v, gone, units) end
    return rebased
  end
  local start = now - now % v.window
  local before = v.start
  v.start = start
  if before > start then return true end
  if before < start then
    if v.kind == 'c' and before == start - v.window then v.prev = v.cur else v.prev = 0 end
    v.cur = 0
  end
  return false
end

local function fresh(v)
  if v.kind == 'b' then return v.level == 0 end
  if v.kind == 's' then return v.n == 0 end
  return v.cur == 0 and v.prev == 0
end

local function reset_of(v, now)
  if v.kind == 'b' then return ceil_div(v.level, v.drain) end
  if v.kind == 's' then return v.n > 0 and at_of(v, v.n - 1) + v.window - now or 0 end
  if v.cur > 0 then return v.start + (v.kind == 'c' and 2 or 1) * v.window - now end
  return v.prev > 0 and v.start + v.window - now or 0
end

local function used_of(v)
  if v.kind == 'b' then return ceil_div(v.level, v.unit) end
  if v.kind == 's' then return v.total end
  return v.cur + v.prev
end

local function derive(rule, source, now)
  local used = source and used_of(source) or 0
  local kind, window = rule.kind, rule.window
  if kind == 'b' then
    return {kind = kind, unit = rule.unit, drain = rule.drain, cap = rule.cap, level = min(used, rule.cap) * rule.unit, t = now}
  elseif kind ~= 's' then
    return {kind = kind, window = window, start = now - now % window, cur = min(used, UNITS_MAX), prev = 0}
  end
  local own = {kind = kind, window = window, q = rule.q, total = 0, n = 0, text = ''}
  local head = slot_end(own, now)
  if source and source.kind == 's' then
    for i = 0, source.n - 1 do
      local at = min(ceil_div(at_of(source, i), rule.q) * rule.q, head)
      if at + window > now then push(own, at, units_of(source, i)) end
    end
  elseif used > 0 then
    push(own, head, used)
  end
  return own
end

local function same(v, rule)
  if v.kind ~= rule.kind then return false end
  if v.kind == 'b' then return v.unit == rule.unit and v.drain == rule.drain end
  return v.window == rule.window and v.q == rule.q
end

local function counter(rule, v, now)
  local span = ceil_div(rule.window, rule.coarse)
  local cur, prev = min(v.cur, rule.cap), min(v.prev, rule.cap)
  return span, cur, prev, (rule.cap - cur) * span - prev * (span - floor((now - v.start) / rule.coarse))
end

-- Returns allowed and retry.
local function judge(rule, v, now, cost)
  local cap = rule.cap
  if cost > cap then return false, -1 end
  if v.kind == 'b' then
    local short = v.level + cost * v.unit - cap * v.unit
    if short <= 0 then return true, 0 end
    return false, ceil_div(short, v.drain)
  elseif v.kind == 's' then
    local excess = v.total + cost - cap
    if excess <= 0 then return true, 0 end
    local i = 0
    while true do
      excess = excess - units_of(v, i)
      if excess <= 0 then return false, at_of(v, i) + v.window - now end
      i = i + 1
    end
  elseif v.kind == 'f' then
    if v.cur + cost <= cap then return true, 0 end
    return false, v.start + v.window - now
  end
  local span, cur, prev, free = counter(rule, v, now)
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
  if v.kind == 'b' then return floor(max(0, rule.cap * v.unit - v.level) / v.unit) end
  if v.kind == 's' then return max(0, rule.cap - v.total) end
  if v.kind == 'f' then return max(0, rule.cap - v.cur) end
  local span, _, _, free = counter(rule, v, now)
  return floor(max(0, free) / span)
end

local function charge(v, now, cost)
  if v.kind == 'b' then
    v.level = v.level + cost * v.unit
  elseif v.kind == 's' then
    push(v, slot_end(v, now), cost)
  else
    v.cur = min(v.cur + cost, UNITS_MAX)
  end
end

local function charge_other(v, now, cost)
  if v.kind ~= 'b' then return charge(v, now, cost) end
  v.level = min(v.level + min(cost, v.cap) * v.unit, max(v.level, v.cap * v.unit))
end

-- Everything is checked before anything is written: a refused call leaves every key as it is.
local function refuse(what) return redis.error_reply('RATETHROTTLE ' .. what) end
local request, mode = ARGV[1], ARGV[2]
local rule_count, entry_count = number(ARGV[3], 1, 128), number(ARGV[4], 1, 128)
if not request or request == '' then return refuse('no request id') end
if mode ~= 'check' and mode ~= 'peek' then return refuse('mode is check or peek') end
if not rule_count or not entry_count then return refuse('the counts of rules and entries are from 1 to 128') end
if #ARGV ~= 4 + 7 * rule_count + 3 * entry_count then return refuse('the number of arguments is wrong') end
local rules, entries = {}, {}
for r = 1, rule_count do
  local at = 4 + 7 * (r - 1)
  local rule = {kind = ARGV[at + 1], cap = number(ARGV[at + 2], 1, 1000000000), window = number(ARGV[at + 3], 1000, 31622400000000),
    unit = number(ARGV[at + 4], 0, TICKS), drain = number(ARGV[at + 5], 0, 1000000000), q = number(ARGV[at + 6], 0, 494100000000),
    coarse = number(ARGV[at + 7], 0, 31622400000000)}
  local kind = rule.kind
  if not (rule.cap and rule.window and rule.unit and rule.drain and rule.q and rule.coarse) then return refuse('a number of a rule is out of range') end
  if not ((kind == 'b' and rule.unit >= 1 and rule.drain >= 1 and rule.cap * rule.unit < TICKS) or (kind == 's' and rule.q >= 1)
      or (kind == 'c' and rule.coarse >= 1 and rule.cap * ceil_div(rule.window, rule.coarse) < TICKS) or kind == 'f') then
    return refuse('a rule does not fit its kind')
  end
  if kind ~= 's' then rule.q = nil end
  rules[r] = rule
end
for e = 1, entry_count do
  local at = 4 + 7 * rule_count + 3 * (e - 1)
  local entry = {key = number(ARGV[at + 1], 1, #KEYS), rule = number(ARGV[at + 2], 1, rule_count), cost = number(ARGV[at + 3], 1, 1000000000)}
  if not (entry.key and entry.rule and entry.cost) then return refuse('a number of an entry is out of range') end
  entries[e] = entry
end

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local stored = redis.call('MGET', unpack(KEYS))
local states = {}
for k = 1, #KEYS do
  local state = {head = "1;", views = {}}
  if stored[k] then
    state.head, state.views = parse(stored[k])
    if not state.head then return refuse('a key holds a state that is not of this version') end
  end
  states[k] = state
end

local function copy(v)
  local twin = {}
  for name, value in pairs(v) do twin[name] = value end
  return twin
end

local reply = {request, text(now)}
for e = 1, entry_count do
  local entry = entries[e]
  local rule, state = rules[entry.rule], states[entry.key]
  local own, other, derived, rebased, first
  -- A view that is kept as it is must not show that it was looked at.
  for i = 1, #state.views do
    local v = copy(state.views[i])
    if roll(v, now) then rebased = true end
    first = first or v
    if not own and same(v, rule) then own = v elseif not other and not fresh(v) then other = v end
  end
  if not own then
    own = derive(rule, first, now)
    derived = not fresh(own)
  end
  local allowed, retry = judge(rule, own, now, entry.cost)
  if mode == 'check' and (allowed or rebased or derived) then
    if allowed then
      charge(own, now, entry.cost)
      own.cap = rule.cap
      if other then charge_other(other, now, entry.cost) end
    end
    state.views = {own, other}
    state.written = true
  end
  local at = #reply
  reply[at + 1] = allowed and 1 or 0
  reply[at + 2] = remaining_of(rule, own, now)
  reply[at + 3] = retry
  reply[at + 4] = reset_of(own, now)
end
for k = 1, #KEYS do
  local state = states[k]
  if state.written then
    local own, other = state.views[1], state.views[2]
    local reset = reset_of(own, now)
    if other then reset = max(reset, reset_of(other, now)) end
    if reset == 0 then
      redis.call('DEL', KEYS[k])
    else
      local parts = state.head .. print_view(own)
      if other then parts = parts .. print_view(other) end
      redis.call('SET', KEYS[k], parts, 'PX', text(ceil_div(reset, 1000) + 1))
    end
  end
end
return reply
