--- Decides entries in order; each distinct key is read once and written at most once.
--- KEYS: state_key...
--- ARGV: request mode rule_count run_count lease_count rule... run... lease...
--- rule: kind capacity window_us unit_ticks drain_ticks slot_us coarse_us lead_us
--- run: key_index key_count rule_index cost count
--- lease: key_index rule_index cost count ahead back back_us
--- reply: request server_us answer...
--- answer_b: granted level
--- answer_s: granted total first_us retry_us reset_us
--- answer_c: granted cur prev since_us
--- answer_f: granted cur since_us
--- limits: keys=128 rules=128 entries=128
-- A run is an entry of `count` equal checks for each of `key_count` consecutive keys. The answer to a lease has one number more:
-- ahead, the units taken ahead. docs/arithmetic.md specifies every step. Numbers are integers below 2^53, exact in Lua's doubles.
--
-- A call's time goes into the strings and tables that it makes, and into calls of C functions. Hence sums with digits as they were
-- read (`x + 0` takes half the time of tonumber), [0-9] for %d where it counts, and no table for the one view of most states.
local floor, min, max, gsub, repeated = math.floor, math.min, math.max, string.gsub, string.rep
local sub, find, match, format, tonumber, call = string.sub, string.find, string.match, string.format, tonumber, redis.call
local TICKS, UNITS_MAX = 4503599627370496, 4000000000

-- '%d' is exact and takes half the time of '%.0f', but only where C's long has 64 bits.
if format('%d', TICKS) ~= '4503599627370496' then
  format = function(shape, ...)
    shape = string.gsub(shape, '%%(%d*)d', '%%%1.0f')
    return string.format(shape, ...)
  end
end

-- Nil for what isn't an integer in the range; every comparison with NaN is false. 1 is common, and in every range there is.
local function number(value, low, high)
  if value == '1' then return 1 end
  local n = tonumber(value)
  if n and n >= low and n <= high and n % 1 == 0 then return n end
  return nil
end

local clock = call('TIME')
local now = clock[1] * 1000000 + clock[2]

-- A view is a table: `kind`, `name` (the text of its definition) and
--   b: unit, drain, cap, level, t
--   f, c: window, start, cur, prev
--   s: window, q, digits, modulus, total, n, first, last, units, width, text, from, kept, more, slot (where what comes now counts
--      from), head (what is taken ahead)
-- A sliding window has n entries, in ascending order. The newest is `last` (us) and `units`; `first` is the oldest one's us. All but
-- the newest stay text, as only those that leave are ever looked at: `digits` of the slot's number, modulo `modulus`, and `width` of
-- the units; first `kept` of them where they were read, in `text` from `from` on, then `more`, what came since. No two entries of a
-- view are as many slots apart as the modulus, so the newest tells which of the equal ones is meant. The server copies a state half a
-- dozen times for a decision: hence so few digits.
local function place_of(v, i)
  local step = v.digits + v.width
  if i < v.kept then return v.text, v.from + i * step end
  return v.more, (i - v.kept) * step + 1
end

local function at_of(v, i)
  local last, q = v.last, v.q
  if i == v.n - 1 then return last end
  local text, from = place_of(v, i)
  return last - (last / q - sub(text, from, from + v.digits - 1)) % v.modulus * q
end

local function units_of(v, i)
  if i == v.n - 1 then return v.units end
  local text, from = place_of(v, i)
  from = from + v.digits
  return sub(text, from, from + v.width - 1) + 0
end

-- Makes the older entries one text.
local function join(v)
  v.text = sub(v.text, v.from, v.from + v.kept * (v.digits + v.width) - 1) .. v.more
  v.from, v.kept, v.more = 1, v.n - 1, ''
end

-- Drops the oldest entries, of a view with nothing in `more`.
local function drop(v, gone)
  v.n, v.kept, v.from = v.n - gone, v.kept - gone, v.from + gone * (v.digits + v.width)
end

-- Has the older entries hold units of so many digits. That stays so until the view is empty, or a count about a power of ten would
-- have them all written again and again.
local function widen(v, width)
  local more = width - v.width
  if more <= 0 then return end
  join(v)
  v.text = gsub(v.text, '(' .. repeated('.', v.digits) .. ')(' .. repeated('.', v.width) .. ')', '%1' .. repeated('0', more) .. '%2')
  v.width = width
end

-- Changes the units of an entry to fewer, of a view with nothing in `more`.
local function set_units(v, i, units)
  if i == v.n - 1 then
    v.units = units
  else
    local text, from = place_of(v, i)
    from = from + v.digits
    v.text = sub(text, 1, from - 1) .. format(format('%%0%dd', v.width), units) .. sub(text, from + v.width)
  end
end

local function slot_end(q, at)
  if q == 1 then return at end
  return at - at % q + q
end

-- How far ahead units may count from: a lease, of whatever version, reaches an eighth of the window at most.
local function reach_end(v)
  return slot_end(v.q, now + floor(v.window / 8))
end

local function push(v, at, units)
  local n = v.n
  if n > 0 and v.last == at then
    local both = min(v.units + units, UNITS_MAX)
    v.total = v.total + both - v.units
    v.units = both
  else
    units = min(units, UNITS_MAX)
    if n == 0 then
      v.first, v.kept, v.more, v.width = at, 0, '', 1
    else
      widen(v, #format('%d', v.units))
      v.more = v.more .. format(format('%%0%dd%%0%dd', v.digits, v.width), v.last / v.q % v.modulus, v.units)
    end
    v.n, v.last, v.units, v.total = n + 1, at, units, v.total + units
  end
  if v.q == 1 and v.total > 64 then
    local gone, excess = 0, v.total - 64
    local held = units_of(v, 0)
    while held <= excess do
      excess = excess - held
      gone = gone + 1
      held = units_of(v, gone)
    end
    join(v)
    drop(v, gone)
    v.first, v.total = at_of(v, 0), 64
    set_units(v, 0, held - excess)
  end
end

-- Brings a view to now; true if the clock had stepped backwards. Done again at the same time it changes nothing.
local function roll(v)
  local kind = v.kind
  if kind == 'b' then
    local past = now - v.t
    if past < 0 then
      v.t = now
      return true
    end
    -- From 2^53 on the product is rounded, but stays above every level.
    local left = v.level - v.drain * past
    v.level, v.t = left > 0 and left or 0, now
    return false
  elseif kind == 's' then
    local n = v.n
    if n == 0 then return false end
    local since, rebased = now - v.window, false
    if v.last <= since then
      v.n, v.total = 0, 0
      return false
    end
    local q = v.q
    -- That is v.last > reach_end(v).
    if v.last - now > v.window / 8 + (q > 1 and q or 0) then
      rebased = true
      local head = reach_end(v)
      local held = 0
      while n > 0 and at_of(v, n - 1) >= head do
        n = n - 1
        held = held + units_of(v, n)
      end
      v.n, v.kept, v.last, v.units = n + 1, n, head, min(held, UNITS_MAX)
      v.total = v.total - held + v.units
    end
    local gone, first = 0, at_of(v, 0)
    while first <= since do
      v.total = v.total - units_of(v, gone)
      gone = gone + 1
      first = at_of(v, gone)
    end
    v.first = first
    if gone > 0 then drop(v, gone) end
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

-- Counts units that were granted now, and others that were taken ahead.
local function charge(v, units, ahead)
  local kind = v.kind
  if kind == 'b' then
    v.level = v.level + (units + ahead) * v.unit
  elseif kind == 's' then
    -- The newest entry, while ahead of now, is that of the slot we are in, or of a later one.
    if units > 0 then push(v, v.n > 0 and v.last > now and v.last or v.slot, units) end
    -- That of a longer lease, or of before the clock stepped back, may be further ahead than this one.
    if ahead > 0 then push(v, v.n > 0 and max(v.last, v.head) or v.head, ahead) end
  else
    v.cur = min(v.cur + units + ahead, UNITS_MAX)
  end
end

-- Returns how long until nothing of a rolled view counts any more, 0 if it is fresh, and the text behind its name, in four pieces.
local function print_view(v)
  local kind = v.kind
  if kind == 'b' then
    local ticks = v.level + v.drain - 1
    return (ticks - ticks % v.drain) / v.drain, format('%d,%d;', v.level, v.t), '', '', ''
  elseif kind == 's' then
    if v.n == 0 then return 0, '0,0,0,1,', '', '', ';' end
    return v.last + v.window - now, format('%d,%d,%d,%d,', v.total, v.last / v.q, v.units, v.width),
      sub(v.text, v.from, v.from + v.kept * (v.digits + v.width) - 1), v.more, ';'
  end
  local ends = v.start + v.window - now
  if kind == 'f' then return v.cur > 0 and ends or 0, format('%d,%d;', v.start, v.cur), '', '', '' end
  return v.cur > 0 and ends + v.window or v.prev > 0 and ends or 0, format('%d,%d,%d;', v.start, v.cur, v.prev), '', '', ''
end

-- A fresh view of a sliding window. From the oldest entry to the newest it is less than the window, its eighth and a slot.
local function sliding_view(window, q, lead)
  local digits = #format('%d', floor((window + window / 8) / q) + 1)
  return {kind = 's', window = window, q = q, digits = digits, modulus = 10 ^ digits, total = 0, n = 0, first = 0, last = 0, units = 0,
    width = 1, text = '', from = 1, kept = 0, more = '', slot = slot_end(q, now), head = slot_end(q, now + lead)}
end

-- Reads what stands behind the name of a sliding window. Returns where the next view would begin; nothing if it is none of ours.
local function read_window(v, state, at)
  local total, last, units, width, from = match(state, '^([0-9]+),([0-9]+),([0-9]+),([0-9]+),()', at)
  local ends = from and find(state, ';', from, true)
  if not ends then return nil end
  v.total, v.last, v.units, v.width = total + 0, last * v.q, units + 0, width + 0
  v.text, v.from, v.kept, v.more = state, from, (ends - from) / (v.digits + v.width), ''
  v.n = v.total > 0 and v.kept + 1 or 0
  return v.kept % 1 == 0 and ends + 1 or nil
end

-- Reads a state that is more than the rule's own view alone. Returns its header, the own view, the other one (rolled) or nil,
-- whether there is something to write already, and whether the own one was derived; nothing if the state is none of ours.
local function read(state, rule)
  local head, at = match(state, '^(1[^;]*;)()')
  if not head then return nil end
  local views, size, count = {}, #state, 0
  while at <= size do
    local kind, view, name_end, after = sub(state, at, at), nil, nil, nil
    if kind == 'b' then
      local unit, drain, cap, level, t
      unit, drain, cap, name_end, level, t, after = match(state, '^b(%d+),(%d+),(%d+),()(%d+),(%d+);()', at)
      if not after then return nil end
      view = {kind = 'b', unit = unit + 0, drain = drain + 0, cap = cap + 0, level = level + 0, t = t + 0}
      if view.unit < 1 or view.drain < 1 then return nil end
    elseif kind == 's' then
      local window, q
      window, q, name_end = match(state, '^s(%d+),(%d+),()', at)
      if not name_end or window + 0 < 1 or q + 0 < 1 then return nil end
      window, q = window + 0, q + 0
      view = sliding_view(window, q, min(rule.lead or window, floor(window / 8)))
      after = read_window(view, state, name_end)
      if not after then return nil end
    elseif kind == 'f' or kind == 'c' then
      local window, start, cur, prev
      window, name_end, start, cur, prev, after = match(state, '^.(%d+),()(%d+),(%d+),?(%d*);()', at)
      if not after or (prev == '') ~= (kind == 'f') or window + 0 < 1 then return nil end
      view = {kind = kind, window = window + 0, start = start + 0, cur = cur + 0, prev = kind == 'c' and prev + 0 or 0}
    else
      return nil
    end
    count = count + 1
    if count > 2 then return nil end
    view.name = sub(state, at, name_end - 1)
    views[count] = view
    at = after
  end

  local first, second = views[1], views[2]
  for i = 1, count do
    local v = views[i]
    -- The name of a bucket holds its capacity too, and that doesn't make it another one.
    if v.name == rule.name or v.kind == 'b' and rule.kind == 'b' and v.unit == rule.unit and v.drain == rule.drain then
      local other = views[3 - i]
      return head, v, other, other and roll(other), false
    end
  end

  -- The own view is derived, from the one that holds most: a definition between the two may have let go, or never have known, what
  -- the other one counts.
  local changed, source, used, kind = false, nil, 0, rule.kind
  for i = 1, count do
    local v = views[i]
    if roll(v) then changed = true end
    local held = v.total
    if v.kind == 'b' then
      held = floor((v.level + v.unit - 1) / v.unit)
    elseif v.kind ~= 's' then
      held = v.cur + v.prev
    end
    if held > used then source, used = v, held end
  end
  if kind == 'b' then
    rule.level, rule.t = min(used, rule.cap) * rule.unit, now
  elseif kind ~= 's' then
    rule.start, rule.cur, rule.prev = now - now % rule.window, min(used, UNITS_MAX), 0
  else
    rule.total, rule.n = 0, 0
    if source and source.kind == 's' then
      local head = reach_end(rule)
      for i = 0, source.n - 1 do
        local from, q = at_of(source, i), rule.q
        local counted = min(from + (-from) % q, head)
        if counted + rule.window > now then push(rule, counted, units_of(source, i)) end
      end
    elseif used > 0 then
      push(rule, rule.slot, used)
    end
    used = rule.n
  end
  return head, rule, first, changed or used > 0, true
end

-- Takes back units of an earlier lease from the own view; true if there were any.
local function give_back(v, lead, back, back_us)
  local kind, given = v.kind, 0
  if kind == 'b' then
    given = min(v.level, max(0, min(back, floor(TICKS / v.unit)) * v.unit - v.drain * max(0, now - back_us)))
    v.level = v.level - given
  elseif kind ~= 's' then
    if back_us - back_us % v.window == v.start then
      given = min(v.cur, back)
      v.cur = v.cur - given
    end
  else
    local at, n, i = slot_end(v.q, back_us + lead), v.n, v.n - 1
    while i >= 0 and at_of(v, i) > at do i = i - 1 end
    if i < 0 or at_of(v, i) ~= at then return false end
    local units = units_of(v, i)
    given = min(units, back)
    units, v.total = units - given, v.total - given
    if units > 0 then
      set_units(v, i, units)
      return given > 0
    elseif i < n - 1 then
      local text, from = place_of(v, i)
      v.text = sub(text, 1, from - 1) .. sub(text, from + v.digits + v.width)
    elseif n > 1 then
      -- The second newest takes its place.
      v.last, v.units = at_of(v, i - 1), units_of(v, i - 1)
    end
    v.n, v.kept = n - 1, v.kept - 1
    if n > 1 then v.first = at_of(v, 0) end
  end
  return given > 0
end

-- Nothing is written before everything is decided, so a refused call leaves every key as it is.
local KEYS, ARGV, refuse = KEYS, ARGV, redis.error_reply
local request, mode, key_count = ARGV[1], ARGV[2], #KEYS
local rule_count, run_count, lease_count = number(ARGV[3], 1, 128), number(ARGV[4], 0, 128), number(ARGV[5], 0, 128)
if not request or request == '' then return refuse('RATETHROTTLE no request id') end
if mode ~= 'check' and mode ~= 'peek' then return refuse('RATETHROTTLE mode is check or peek') end
if not (rule_count and run_count and lease_count and run_count + lease_count >= 1) then
  return refuse('RATETHROTTLE the counts of rules and of entries are from 1 to 128')
end
if not (key_count >= 1 and key_count <= 128) then return refuse('RATETHROTTLE the count of keys is from 1 to 128') end
local right = 5 + 8 * rule_count + 5 * run_count + 7 * lease_count
if #ARGV ~= right then return refuse('RATETHROTTLE the number of arguments is wrong') end
if key_count > 1 then
  local seen = {}
  for k = 1, key_count do
    local key = KEYS[k]
    if seen[key] then return refuse('RATETHROTTLE a key is given twice') end
    seen[key] = true
  end
end

-- A rule is at the same time the view of its definition, for the state at hand: one table serves all keys.
local rules, at = {nil}, 5
for r = 1, rule_count do
  local kind, rule = ARGV[at + 1], nil
  local cap, window = number(ARGV[at + 2], 1, 1000000000), number(ARGV[at + 3], 1000, 31622400000000)
  -- What a kind doesn't have is '0', to the letter.
  local unit, drain, q, coarse, lead = ARGV[at + 4], ARGV[at + 5], ARGV[at + 6], ARGV[at + 7], ARGV[at + 8]
  if not (cap and window) then return refuse('RATETHROTTLE a number of a rule is out of range') end
  if kind == 'b' then
    unit, drain = number(unit, 1, TICKS), number(drain, 1, 1000000000)
    if unit and drain and cap * unit < TICKS and q == '0' and coarse == '0' and lead == '0' then
      rule = {kind = 'b', cap = cap, unit = unit, drain = drain, name = format('b%d,%d,%d,', unit, drain, cap), level = 0, t = 0}
    end
  elseif unit ~= '0' or drain ~= '0' then
    rule = nil
  elseif kind == 's' then
    q, lead = number(q, 1, window), number(lead, 0, window / 8)
    if q and lead and ((q == 1 and cap <= 64) or q == floor((window + 63) / 64)) and coarse == '0' then
      rule = sliding_view(window, q, lead)
      rule.cap, rule.lead, rule.name = cap, lead, format('s%d,%d,', window, q)
    end
  elseif kind == 'c' then
    coarse = number(coarse, 1, window)
    local span = coarse and floor((window + coarse - 1) / coarse)
    if span and cap * span < TICKS and q == '0' and lead == '0' then
      rule = {kind = 'c', cap = cap, window = window, coarse = coarse, span = span, name = format('c%d,', window), start = 0, cur = 0,
        prev = 0}
    end
  elseif kind == 'f' and q == '0' and coarse == '0' and lead == '0' then
    rule = {kind = 'f', cap = cap, window = window, name = format('f%d,', window), start = 0, cur = 0, prev = 0}
  end
  if not rule then return refuse('RATETHROTTLE a rule does not fit its kind') end
  rule.alone = '1;' .. rule.name
  rules[r], at = rule, at + 8
end

-- By key: the state as text, false if there is none; until when it counts, where that is known; and for what was written, how long.
local states, ends, resets = call('MGET', unpack(KEYS)), {nil}, {nil}
-- The nils make room, so that the table doesn't grow twice for one answer.
local reply, filled, entries, consumes = {request, now, nil, nil, nil, nil, nil}, 2, 0, mode == 'check'
for i = 1, run_count + lease_count do
  local is_lease = i > run_count
  local key, last_key, rule, cost, count = number(ARGV[at + 1], 1, key_count), nil, nil, nil, nil
  local wanted, back, back_us = 0, 0, 0
  if is_lease then
    rule, cost, count = number(ARGV[at + 2], 1, rule_count), number(ARGV[at + 3], 1, 1000000000), number(ARGV[at + 4], 0, 1000000)
    wanted, back = number(ARGV[at + 5], 0, 1000000000), number(ARGV[at + 6], 0, 1000000000)
    back_us = number(ARGV[at + 7], 0, 9007199254740991)
    if not (wanted and back and back_us) then return refuse('RATETHROTTLE a number of a lease is out of range') end
    last_key, at = key, at + 7
    if not consumes then wanted, back = 0, 0 end
  else
    rule, cost, count = number(ARGV[at + 3], 1, rule_count), number(ARGV[at + 4], 1, 1000000000), number(ARGV[at + 5], 1, 1000000)
    last_key = key and number(ARGV[at + 2], 1, key_count - key + 1)
    last_key, at = last_key and key + last_key - 1, at + 5
  end
  if not (last_key and rule and cost and count) then return refuse('RATETHROTTLE a number of a run or lease is out of range') end
  entries = entries + last_key - key + 1
  if entries > 128 then return refuse('RATETHROTTLE there are more than 128 entries') end
  rule = rules[rule]
  local kind, cap, alone = rule.kind, rule.cap, rule.alone
  local skip = #alone

  for k = key, last_key do
    -- Most states are the rule's own view alone; `read` takes the others.
    local state, head, own, other, changed, derived = states[k], '1;', nil, nil, false, false
    if not state then
      own = rule
      if kind == 'b' then rule.level, rule.t = 0, now
      elseif kind == 's' then rule.n, rule.total = 0, 0
      else rule.start, rule.cur, rule.prev = now - now % rule.window, 0, 0 end
    elseif sub(state, 1, skip) == alone then
      if kind == 'b' then
        local level, t = match(state, '^([0-9]+),([0-9]+);$', skip + 1)
        if t then own, rule.level, rule.t = rule, level + 0, t + 0 end
      elseif kind == 's' then
        if read_window(rule, state, skip + 1) == #state + 1 then
          own = rule
          if rule.n > 0 and not resets[k] then ends[k] = rule.last + rule.window end
        end
      elseif kind == 'f' then
        local start, cur = match(state, '^([0-9]+),([0-9]+);$', skip + 1)
        if cur then
          own, rule.start, rule.cur = rule, start + 0, cur + 0
          if rule.cur > 0 and not resets[k] then ends[k] = rule.start + rule.window end
        end
      else
        local start, cur, prev = match(state, '^([0-9]+),([0-9]+),([0-9]+);$', skip + 1)
        if prev then
          own, rule.start, rule.cur, rule.prev = rule, start + 0, cur + 0, prev + 0
          if rule.cur > 0 and not resets[k] then ends[k] = rule.start + 2 * rule.window end
        end
      end
    end
    if not own then
      head, own, other, changed, derived = read(state, rule)
      if not head then return refuse('RATETHROTTLE a key holds a state that is not of this version') end
    end
    if roll(own) then changed = true end
    -- A view that was derived just now doesn't hold the lease's units as such.
    if back > 0 and not derived and give_back(own, rule.lead, back, back_us) then changed = true end

    -- Units that are free; negative if a limit was lowered.
    local free
    if kind == 'b' then
      free = cap * own.unit - own.level
      free = (free - free % own.unit) / own.unit
    elseif kind == 's' then
      free = cap - own.total
    elseif kind == 'f' then
      free = cap - own.cur
    else
      local span, past, cur, prev = rule.span, now - own.start, own.cur, own.prev
      if cur > cap then cur = cap end
      if prev > cap then prev = cap end
      free = (cap - cur) * span - prev * (span - floor(past / rule.coarse))
      free = (free - free % span) / span
    end
    local granted, ahead, units = count, 0, count * cost
    if units > free then
      granted = free > 0 and floor(free / cost) or 0
      units = granted * cost
    end
    if not consumes then
      granted = min(granted, 1)
    else
      if wanted > 0 and granted == count then ahead = min(wanted, max(0, floor((free - units) / 8))) end
      if units + ahead > 0 then
        charge(own, units, ahead)
        own.name, changed = rule.name, true
        if other and other.kind == 'b' then
          -- A definition never owes more than its capacity for what another one admitted.
          other.level = min(other.level + min(units + ahead, other.cap) * other.unit, max(other.level, other.cap * other.unit))
        elseif other then
          charge(other, units, ahead)
        end
      end
      if changed then
        local reset, fields, text, more, last = print_view(own)
        if other then
          local other_reset, other_fields, other_text, other_more, other_last = print_view(other)
          reset = max(reset, other_reset)
          text = head .. own.name .. fields .. text .. more .. last
            .. other.name .. other_fields .. other_text .. other_more .. other_last
        else
          text = head .. own.name .. fields .. text .. more .. last
        end
        states[k], resets[k] = reset > 0 and text, reset
      end
    end

    reply[filled + 1] = granted
    if kind == 'b' then
      reply[filled + 2] = own.level
      filled = filled + 2
    elseif kind == 's' then
      local first, retry, reset = 0, 0, 0
      if granted < count then
        retry = -1
        if cost <= cap then
          -- When enough has left, from the oldest on.
          local excess, j = own.total + cost - cap, 0
          while excess > 0 do
            excess = excess - units_of(own, j)
            j = j + 1
          end
          retry = j > 0 and at_of(own, j - 1) + own.window - now or 0
        end
      end
      if own.n > 0 then first, reset = own.first + own.window - now, own.last + own.window - now end
      reply[filled + 2], reply[filled + 3], reply[filled + 4], reply[filled + 5] = own.total, first, retry, reset
      filled = filled + 5
    elseif kind == 'f' then
      reply[filled + 2], reply[filled + 3] = own.cur, now - own.start
      filled = filled + 3
    else
      reply[filled + 2], reply[filled + 3], reply[filled + 4] = own.cur, own.prev, now - own.start
      filled = filled + 4
    end
    if is_lease then
      filled = filled + 1
      reply[filled] = ahead
    end
  end
end

local expiry_ms, expiry_of = nil, nil
for k = 1, key_count do
  local reset = resets[k]
  if reset == 0 then
    call('DEL', KEYS[k])
  elseif reset and ends[k] == now + reset then
    -- The key expires when it must already, and to leave that alone costs two thirds of setting it.
    call('SET', KEYS[k], states[k], 'KEEPTTL')
  elseif reset then
    -- Windows of one rule end together.
    if reset ~= expiry_of then expiry_of, expiry_ms = reset, format('%d', floor((reset + 999) / 1000) + 1) end
    call('PSETEX', KEYS[k], expiry_ms, states[k])
  end
end
return reply
