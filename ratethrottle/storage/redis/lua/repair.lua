--- Puts back what Redis has lost: what processes know of before the epoch, and what they admitted while they could not ask.
--- KEYS: epoch_key state_key... marker_key
--- ARGV: request mode epoch rule_count item_count rule... item... teller
--- rule: kind capacity window_us unit_ticks drain_ticks slot_us coarse_us lead_us
--- assert_item: key_index rule_index generation a b c told_us
--- charge_item: key_index rule_index newest_us count charge...
--- charge: age_us units
--- teller: process_id level_us first_item
--- reply: request server_us applied refusal...
--- refusal: item_number why
--- why: out_of_range=1 unreadable=2 deferred=3
--- limits: keys=128 rules=128 items=128 charges=128
-- With mode `assert` there is no marker_key. a b c: of b level 0 0, of s units leaves_us heard_us (ago), of f count since_us 0, of c cur since_us
-- prev.
-- told_us: the server's time, before the epoch, when that was heard; 0 if it was in an older one than the process knew. Of assertions the
-- teller comes last: which process tells, how far it has come (telling.lua), and the number of the item to begin with. There may be
-- no items. A call ends when it has worked for about a millisecond: that item and all behind it are deferred, to be sent again.
-- Units of b are ticks, in two charges at most: those of age 0 are new; others, of which the newest is so old, were
-- charged before, and may have drained too early.
-- newest_us is the age of the newest of a key's charges: what is older than its last reset is not counted.
-- A call that charges is run once, however often it is sent: the marker tells. `applied` counts the items that were taken in. An item
-- with a number out of range, or of a rule with one, is refused alone, and so is one whose state can't be read, which stays as it is.
-- In another epoch than the one expected, the reply is just -1 for the server's time, and nothing was done.

-- The entries of a sliding window as two tables, in order: us and units.
local function entries_of(v)
  local ats, counts, n = {nil}, {nil}, v.n
  if n == 0 then return ats, counts end
  join(v)
  local text, at, digits, step, last, q, modulus = v.text, v.from, v.digits, v.digits + v.width, v.last, v.q, v.modulus
  local newest = last / q
  for i = 1, n - 1 do
    ats[i], counts[i] = last - (newest - sub(text, at, at + digits - 1)) % modulus * q, sub(text, at + digits, at + step - 1) + 0
    -- Negated, since NaN is a number too.
    if not (ats[i] > (ats[i - 1] or 0) and counts[i] > 0 and ats[i] < last) then error('the entries of a state do not ascend') end
    at = at + step
  end
  ats[n], counts[n] = last, v.units
  return ats, counts
end

-- Makes those of two such pairs of tables the entries, without those that hold nothing; without slots, the newest 65 units.
local function set_entries(v, ats, counts, more_ats, more_counts)
  local i, j, n, left = #ats, #more_ats, 0, v.q == 1 and 65 or 1e15
  local at_of_n, units_of_n, total, widest, older = {nil}, {nil}, 0, 1, {nil}
  while left > 0 and (i > 0 or j > 0) do
    local at, units = max(ats[i] or 0, more_ats[j] or 0), 0
    while i > 0 and ats[i] == at do units, i = units + counts[i], i - 1 end
    while j > 0 and more_ats[j] == at do units, j = units + more_counts[j], j - 1 end
    units = min(units, UNITS_MAX, left)
    if units > 0 then
      if n > 0 then widest = max(widest, units) end
      n, left, total = n + 1, left - units, total + units
      at_of_n[n], units_of_n[n] = at, units
    end
  end
  v.n, v.total, v.kept, v.from, v.more, v.width = n, total, max(0, n - 1), 1, '', #format('%d', widest)
  local shape = format('%%0%dd%%0%dd', v.digits, v.width)
  for k = n, 2, -1 do older[n - k + 1] = format(shape, at_of_n[k] / v.q % v.modulus, units_of_n[k]) end
  v.text = table.concat(older)
  if n > 0 then v.first, v.last, v.units = at_of_n[n], at_of_n[1], units_of_n[1] end
end

-- What a sliding window held that was used before the epoch: a table of `held` (units inherited), `added` (those that were asserted,
-- beyond that) and `at` (us, where these are). By definition, in the header's order.
local function bases_of(h)
  local bases = {}
  for window, q, held, added, at in string.gmatch(h.bases, 's(%d+),(%d+),(%d+),(%d+),(%d+)') do
    bases[#bases + 1] = {window = window + 0, q = q + 0, held = held + 0, added = added + 0, at = at + 0}
  end
  return bases
end

local function base_of(h, v)
  for i = 1, #h.all do
    if h.all[i].window == v.window and h.all[i].q == v.q then return h.all[i] end
  end
  -- Of two definitions only the one that came first had this noted. What was granted since and has left makes it less than it was.
  local base = {window = v.window, q = v.q, held = max(0, v.total - h.granted), added = 0, at = 0}
  h.all[#h.all + 1] = base
  return base
end

local function print_bases(h)
  local text = ''
  for i = 1, #h.all do
    local base = h.all[i]
    text = text .. format('s%d,%d,%d,%d,%d', base.window, base.q, base.held, base.added, base.at)
  end
  return text
end

-- Takes what was asserted out of the entries of a window. It was merged into the newest entry if the clock was set back since.
local function take_out(v, base, ats, counts)
  local at = v.n > 0 and min(base.at, v.last) or 0
  for i = 1, #ats do
    if ats[i] == at then counts[i] = counts[i] - min(counts[i], base.added) end
  end
end

-- Where the aligned window began that an instant is in; of a calendar's, its end less the mean length.
local function window_at(v, at)
  if not v.id then return window_start(v.window, at) end
  local rule = v.edges and v or v.rule
  if not rule then return at - (at - v.start) % v.window end
  local _, ends = span_of(rule.edges, v.window, at)
  return ends - v.window
end

-- Where the aligned window began in which this state was first touched in the epoch: what is asserted is of then, or older.
local function first_window(h, v)
  return window_at(v, h.start)
end

-- Joins `units` that were used in an aligned window before the epoch.
local function join_count(v, h, start, units)
  local first = first_window(h, v)
  if units == 0 then return end
  if start > first and v.start < start then
    -- By the old server's clock the next window had begun: it stands, and what was granted here since counts in it.
    v.prev = v.kind == 'c' and v.start == first and max(0, v.cur - h.granted) or 0
    v.start, v.cur = start, 0
  end
  if start >= first and v.start <= start then
    v.cur = max(v.cur, min(units + h.granted, UNITS_MAX))
  elseif v.kind == 'c' and start >= first and v.start == start + v.window then
    -- What of `granted` isn't in the window that has begun since was in that one.
    v.prev = max(v.prev, min(units + max(0, h.granted - v.cur), UNITS_MAX))
  elseif v.kind == 'c' and start == first - v.window and v.start <= first then
    v.prev = max(v.prev, units)
  end
end

-- Joins `units` that count from `at` at the latest, and were heard of at `heard`.
local function join_window(v, h, units, at, heard)
  local base = base_of(h, v)
  -- A process may still have heard the old master when others had told this one what they know: what was inherited and has left
  -- since isn't among these units.
  local held = heard < h.start and base.held or min(base.held, max(0, v.total - h.granted - base.added))
  local added = units - held
  at = min(at + (-at) % v.q, reach_end(v))
  if added <= 0 or at + v.window <= now then return end
  added, at = max(added, base.added), max(at, base.at)
  if added == base.added and at == base.at then return end
  if base.added == 0 and (v.n == 0 or at >= v.last) then
    push(v, at, added)
  else
    local ats, counts = entries_of(v)
    take_out(v, base, ats, counts)
    set_entries(v, ats, counts, {at}, {added})
  end
  base.added, base.at = added, at
end

-- What is asserted holds at the same time as what was granted since, on top of it: their sum is what the level would be now.
local function join_bucket(v, h, ticks, most)
  -- Whole units apart, since what was granted since needn't be below 2^53 in ticks.
  local rest = ticks % v.unit
  local units = (ticks - rest) / v.unit + h.granted
  if units * v.unit < most then most = max(0, units * v.unit + rest) end
  v.level = max(v.level, most)
end

-- Joins what a process knows of one definition, to its view and to the other one: as `read` derives a view, but all of it from when
-- the state was first touched, so that to do it again changes nothing.
local function join(rule, own, other, h, a, b, c)
  local EXACT_MAX, kind, units, at, heard = 9007199254740991, rule.kind, a, slot_end(other and other.q or 1, h.start), 0
  if kind == 'b' then
    join_bucket(own, h, a, min(EXACT_MAX, 2 * rule.cap * own.unit + BOOKED_US * own.drain))
    units = floor((max(0, a) + own.unit - 1) / own.unit)
  elseif kind == 's' then
    at = now + b - own.window
    heard = now - c
    join_window(own, h, units, at, heard)
  else
    -- The nearest window: a process measures from when it heard of it, and servers' clocks differ.
    local start = window_at(own, now - b + floor(own.window / 2))
    start = min(start, window_at(own, first_window(h, own) + own.window))
    join_count(own, h, start, a)
    if kind == 'c' then join_count(own, h, start - own.window, c) end
    units = (start >= own.start and a or 0) + (kind == 'c' and (start >= own.start and c or start == own.start - own.window and a) or 0)
  end
  if not other or units == 0 then return end
  if other.kind == 'b' then
    join_bucket(other, h, units * other.unit, other.cap * other.unit)
  elseif other.kind == 's' then
    join_window(other, h, units, at, heard)
  else
    join_count(other, h, max(first_window(h, other), other.start > now and other.start or 0), units)
  end
end

-- Leaves of a view only what was granted since, or more if that can't be told apart.
local function forget(v, h)
  local kind, granted = v.kind, h.granted
  if kind == 'b' then
    v.level = min(v.level, granted * v.unit)
  elseif kind == 's' then
    local base, ats, counts = base_of(h, v), entries_of(v)
    take_out(v, base, ats, counts)
    -- Nothing was granted since at an earlier place than what was there.
    for i = #ats, 1, -1 do
      counts[i] = min(counts[i], granted)
      granted = granted - counts[i]
    end
    set_entries(v, ats, counts, {}, {})
    base.held, base.added, base.at = 0, 0, 0
  else
    local first = first_window(h, v)
    if v.start <= first then
      v.cur, v.prev = min(v.cur, granted), 0
    elseif v.id or v.start == first + v.window then
      v.cur = min(v.cur, granted)
      v.prev = min(v.prev, granted - v.cur)
    end
  end
end

-- Counts units of a view that were admitted elsewhere; returns how many of them a later assertion must come on top of.
local function charge(v, h, charges)
  local kind, counted = v.kind, 0
  local more_ats, more_counts, n = {nil}, {nil}, 0
  for i = 1, #charges do
    local at, units = now - charges[i][1], charges[i][2]
    if kind == 's' then
      at = slot_end(v.q, at)
      if at + v.window > now and at > h.generation then
        n, counted = n + 1, counted + units
        more_ats[n], more_counts[n] = at, units
      end
    elseif kind ~= 'b' then
      local start = window_at(v, at)
      if start + v.window <= h.generation then
        start = -1
      elseif start + v.window > now then
        -- What comes before the window that stands counts in it, like all that is admitted by then.
        start = max(start, v.start)
      end
      if start == v.start then
        v.cur = min(v.cur + units, UNITS_MAX)
      elseif kind == 'c' and start == v.start - v.window then
        v.prev = min(v.prev + units, UNITS_MAX)
      end
      if start >= first_window(h, v) then counted = counted + units end
    else
      counted = counted + units
    end
  end
  if n > 0 and n <= 4 and (v.n == 0 or more_ats[1] >= v.last) then
    for i = 1, n do push(v, more_ats[i], more_counts[i]) end
  elseif n > 0 then
    local ats, counts = entries_of(v)
    set_entries(v, ats, counts, more_ats, more_counts)
  end
  if kind == 'b' then v.level = min(v.level + min(counted, v.cap) * v.unit, max(v.level, v.cap * v.unit)) end
  return counted
end

-- Counts ticks that are new, and, up to the capacity, such as were charged before and may have drained too early: a process owes by its
-- share of the rate, while the state drains by all of it.
local function charge_bucket(v, h, rule, charges)
  local again, new = 0, 0
  for i = 1, #charges do
    local age, ticks = charges[i][1], charges[i][2]
    if age == 0 then
      new = new + ticks
    elseif now - age > h.generation then
      again = again + ticks
    end
  end
  v.level = min(v.level + new, max(v.level, 2 * rule.cap * v.unit))
  v.level = min(v.level + again, max(v.level, rule.cap * v.unit))
  return floor((new + v.unit - 1) / v.unit)
end

local KEYS, ARGV, refuse = KEYS, ARGV, redis.error_reply
local request, mode, charges = ARGV[1], ARGV[2], ARGV[2] == 'charge'
local key_count = #KEYS - (charges and 2 or 1)
local rule_count, item_count = number(ARGV[4], 1, 128), number(ARGV[5], charges and 1 or 0, 128)
if not request or request == '' then return refuse('RATETHROTTLE no request id') end
if mode ~= 'assert' and not charges then return refuse('RATETHROTTLE mode is assert or charge') end
if not (rule_count and item_count) then return refuse('RATETHROTTLE the counts of rules and of items are from 1 to 128') end
if not (key_count >= (charges and 1 or 0) and key_count <= 128) then return refuse('RATETHROTTLE the count of keys is from 1 to 128') end
local seen = {}
for k = 1, #KEYS do
  if seen[KEYS[k]] then return refuse('RATETHROTTLE a key is given twice') end
  seen[KEYS[k]] = true
end
local EXACT_MAX, WORK_MAX = 9007199254740991, 128
local rules = read_rules(5, rule_count, true)

local at = 5 + 8 * rule_count
local function key_and_rule(from)
  local key, rule = number(ARGV[from + 1], 1, key_count), rules[number(ARGV[from + 2], 1, rule_count) or 0]
  return key and rule and key + 1, rule
end

-- What an item asserts; false if a number of it is out of range. Read only when its turn has come.
local first_row = at
local function assertion(i)
  local from = first_row + 7 * (i - 1)
  local key, rule = key_and_rule(from)
  if not key then return false end
  local kind = rule.kind
  local item = {key = key, rule = rule, generation = number(ARGV[from + 3], 0, EXACT_MAX),
    a = number(ARGV[from + 4], kind == 'b' and -EXACT_MAX or 0, kind == 'b' and EXACT_MAX or UNITS_MAX),
    b = number(ARGV[from + 5], kind == 's' and 1 or kind ~= 'b' and -rule.window or 0, kind == 'b' and 0 or EXACT_MAX),
    c = number(ARGV[from + 6], 0, kind == 'c' and UNITS_MAX or kind == 's' and EXACT_MAX or 0), told = number(ARGV[from + 7], 0, EXACT_MAX)}
  return item.generation and item.a and item.b and item.c and item.told and item
end

local charged, teller, level, first = {}, nil, nil, 1
if charges then
  for i = 1, item_count do
    local key, rule = key_and_rule(at)
    local kind, newest, count = rule and rule.kind, number(ARGV[at + 3], 0, EXACT_MAX), number(ARGV[at + 4], 1, 128)
    if not count then return refuse('RATETHROTTLE a count of charges is out of range') end
    local item, fits = {key = key, rule = rule, newest = newest}, key and newest and (kind ~= 'b' or count <= 2)
    at = at + 4
    for j = 1, count do
      local age, units = number(ARGV[at + 1], 0, EXACT_MAX), number(ARGV[at + 2], 1, kind == 'b' and TICKS or UNITS_MAX)
      fits, item[j], at = fits and age and units and true, {age, units}, at + 2
    end
    -- The oldest comes first, so that they are merged as they are.
    if fits then table.sort(item, function(one, other) return one[1] > other[1] end) end
    charged[i] = fits and item
  end
else
  at = at + 7 * item_count + 3
  teller, level, first = ARGV[at - 2], number(ARGV[at - 1], 0, EXACT_MAX), number(ARGV[at], 1, 128)
  if not (teller and teller ~= '' and level and first) then return refuse('RATETHROTTLE nobody tells') end
end
if #ARGV ~= at then return refuse('RATETHROTTLE the number of arguments is wrong') end

views()
local entered = enter(states, ARGV[3])
if entered == nil then return {request, -1} end
if not entered then return refuse('RATETHROTTLE the epoch is malformed') end
local marker = charges and KEYS[key_count + 2]
if charges and states[key_count + 2] or not charges and repair_us == 0 then return {request, now, 0} end

-- Returns the state with an item taken in, how long it must be kept, and how many entries its sliding windows have; false if there is
-- nothing to take in; nothing if the state can't be read. Raises an error if it is damaged.
local function taken_in(item)
  local rule, state = item.rule, states[item.key] or '1;'
  if not charges and item.told > 0 and item.generation == 0 then
    -- A process that heard of it later has told all of this, and more.
    local name, told, after = match(state, '^1e([0-9]+),[0-9]+,[0-9]+,([0-9]+)[^;]*;()')
    if name == epoch and told + 0 > item.told and sub(state, after, after + #rule.name - 1) == rule.name then return false end
  end
  local head, own, other = read(state, rule)
  if not head then return nil end
  roll(own)
  local h = read_header(head, own, other)
  if not h then return nil end
  h.all = h.since and bases_of(h) or {}
  if charges and h.generation > 0 and now - item.newest <= h.generation then
    return false
  elseif charges then
    local counted = rule.kind == 'b' and charge_bucket(own, h, rule, item) or charge(own, h, item)
    if other and counted > 0 then charge(other, h, rule.kind == 'b' and {{0, counted}} or item) end
    h.granted = min(h.granted + counted, UNITS_MAX)
  elseif item.generation < h.generation then
    return false
  else
    if item.generation > h.generation then
      forget(own, h)
      if other then forget(other, h) end
      h.generation, h.keep = item.generation, max(h.keep, reach(own), other and reach(other) or 0)
    end
    join(rule, own, other, h, item.a, item.b, item.c)
    h.told = max(h.told, item.told)
  end
  h.bases = print_bases(h)
  local reset, text = print_state(print_header(h), own, other)
  return text, max(reset, h.keep), (own.n or 0) + (other and other.n or 0)
end

-- Of work, one is a key told of which nothing is stored.
local applied, keeps, work, refusals = 0, {}, 0, {}
local function refuse_item(i, why)
  refusals[#refusals + 1], refusals[#refusals + 2] = i, why
end
for i = first, item_count do
  if work >= WORK_MAX and not charges then
    refuse_item(i, 3)
    break
  end
  local item
  if charges then item = charged[i] else item = assertion(i) end
  if item then
    -- A state that can't be read stays as it is: the other keys have to be repaired all the same.
    local fine, text, keep_us, held = pcall(taken_in, item)
    work = work + 1 + (fine and held and max(0, held - 4) or 0) / 6
    if not fine or text == nil then
      refuse_item(i, 2)
    elseif text then
      applied, states[item.key], keeps[item.key] = applied + 1, text, keep_us
    end
  else
    refuse_item(i, 1)
  end
end

if charges then call('SET', marker, '1', 'PX', 60000) end
for k = 2, key_count + 1 do
  local keep_us = keeps[k]
  -- Until then it counts, or its header does; it expires as in decide.lua.
  if keep_us and keep_us > 0 then
    local second = now + keep_us
    local expiry_ms = format('%d', floor((second - second % 1000000 + 2000000 - now) / 1000))
    call('PSETEX', KEYS[k], expiry_ms, states[k])
  end
end
if not charges then
  tells(KEYS[1], teller, level, now)
  local left = untold(KEYS[1], now)
  local value = sub(states[1], 1, 72)
  local suffix = cleared and '1' or '0'
  if left > 0 or cleared then value = value .. suffix .. format('%016.0f', left) end
  if value ~= states[1] then call('SET', KEYS[1], value) end
end
return {request, now, applied, unpack(refusals)}
