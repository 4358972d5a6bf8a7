-- What the scripts share: the loader puts it in front of each that reads states. Numbers are integers below 2^53, exact in Lua's
-- doubles. docs/arithmetic.md specifies every step.
--
-- A call's time goes into the strings and tables that it makes, and into calls of C functions. Hence sums with digits as they were
-- read (`x + 0` takes half the time of tonumber), [0-9] for %d where it counts, and no table for the one view of most states.
local floor, min, max, gsub, repeated = math.floor, math.min, math.max, string.gsub, string.rep
local sub, find, match, format, tonumber, call = string.sub, string.find, string.match, string.format, tonumber, redis.call
local TICKS, UNITS_MAX = 4503599627370496, 4000000000
-- How long states note what was granted since an epoch began, for those to assert what they know who come late.
local REPAIR_US = 10000000
-- How far ahead a turn may be that is booked.
local BOOKED_US = 60000000

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

-- The epoch's name, and how long from now on states still note what was granted since it began: 0 in normal operation.
-- W: others may still tell what they know of that server time (of the epoch before) or earlier; 0 if nobody does.
local epoch, repair_us, untold_us = 0, 0, 0
-- Whether what isn't of this epoch was cleared.
local cleared = false

-- Takes in the epoch key's value, which stands before the states: nil if it isn't the one expected, false if that is none.
local function enter(states, expected)
  local value = states[1]
  if value ~= expected then
    -- There may be more behind it, which beat.lua describes.
    if not value or #value ~= 89 or sub(value, 1, 72) ~= expected then return nil end
    cleared, untold_us = sub(value, 73, 73) == '1', number(sub(value, 74), 0, 9007199254740991)
    if not untold_us then return false end
  end
  -- M, by when all have come; 0 where nobody knew of anything before, and then E is the server's time too.
  local began = number(sub(expected, 57), 0, 9999999999999999)
  if not began or #expected ~= 72 then return false end
  epoch = sub(expected, 41, 56)
  if began == 0 then began = epoch + 0 end
  -- A clock that was set back by more than that has left the epoch's beginning behind as well.
  local past = now - began
  if past < REPAIR_US and past > -REPAIR_US then repair_us = REPAIR_US - past end
  cleared = cleared and repair_us > 0
  -- As long as somebody tells, states note what was granted since.
  if untold_us > 0 then repair_us = REPAIR_US end
  if cleared then
    -- What was there when all was cleared may not have been deleted yet. A marker is '1' alone.
    local mark = '1e' .. epoch
    for k = 2, #KEYS do
      local state = states[k]
      if state and #state > 1 and sub(state, 1, 18) ~= mark then states[k] = false end
    end
  end
  return true
end

-- A view is a table: `kind`, `name` (the text of its definition) and
--   b: unit, drain, cap, level, t
--   f, c: window, start, cur, prev; with `id` its windows are those of a calendar: then `window` is their mean length, and a window
--      begins, for us, that long before it ends
--   s: window, q, digits, modulus, total, n, first, last, units, width, text, from, kept, more, slot (where what comes now counts
--      from), head (what is taken ahead)
-- A sliding window has n entries, in ascending order. The newest is `last` (us) and `units`; `first` is the oldest one's us. All but
-- the newest stay text, as only those that leave are ever looked at: `digits` of the slot's number, modulo `modulus`, and `width` of
-- the units; first `kept` of them where they were read, in `text` from `from` on, then `more`, what came since. No two entries of a
-- view are as many slots apart as the modulus, so the newest tells which of the equal ones is meant. A state is copied several times to
-- be read, and again to be written: hence so few digits.

local function slot_end(q, at)
  if q == 1 then return at end
  return at - at % q + q
end

-- 1970-01-01 was a Thursday: three days of its week had passed.
local WEEK, PASSED = 604800000000, 259200000000

-- Where the aligned window began that an instant is in. Those of whole weeks begin on a Monday, UTC.
local function window_start(window, at)
  local passed = window % WEEK == 0 and PASSED or 0
  return at - (at + passed) % window
end

-- How far ahead of now units count at most; from further away the clock was set back.
local function ahead_of(window, q)
  return window / 8 + (q > 1 and q or 0)
end

-- A fresh view of a sliding window. From the oldest entry to the newest it is less than the window, its eighth and a slot.
local function sliding_view(window, q, lead)
  local digits = #format('%d', floor((window + window / 8) / q) + 1)
  return {kind = 's', window = window, q = q, digits = digits, modulus = 10 ^ digits, total = 0, n = 0, first = 0, last = 0, units = 0,
    width = 1, text = '', from = 1, kept = 0, more = '', slot = slot_end(q, now), head = slot_end(q, now + lead)}
end

-- When the window of a calendar begins and ends that an instant is in: made for the first rule that has one (dated.lua).
local span_of

-- A rule is at the same time the view of its definition, for the state at hand: one table serves all keys.
-- Returns the rules that begin behind ARGV[at]; if one is wrong, nothing but what is wrong with it, or false in its place if the
-- others are to be kept.
local function read_rules(at, rule_count, keeps)
  local rules = {nil}
  for r = 1, rule_count do
    local kind, rule = ARGV[at + 1], nil
    local cap, window = number(ARGV[at + 2], 1, 1000000000), number(ARGV[at + 3], 1000, 31622400000000)
    -- What a kind doesn't have is '0', to the letter.
    local unit, drain, q, coarse, lead = ARGV[at + 4], ARGV[at + 5], ARGV[at + 6], ARGV[at + 7], ARGV[at + 8]
    if not (cap and window) then
      if not keeps then return nil, 'RATETHROTTLE a number of a rule is out of range' end
    elseif kind == 'b' then
      -- Each table has room for all that it will hold: to grow takes as long as to fill it.
      unit, drain = number(unit, 1, TICKS), number(drain, 1, 1000000000)
      if unit and drain and cap * unit < TICKS and q == '0' and coarse == '0' and lead == '0' then
        rule = {kind = 'b', cap = cap, unit = unit, drain = drain, name = format('b%d,%d,%d,', unit, drain, cap), level = 0, t = 0,
          alone = '', place = ''}
      end
    elseif kind == 'd' then
      -- include dated.lua
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
          prev = 0, began = window_start(window, now)}
      end
    elseif kind == 'f' and q == '0' and coarse == '0' and lead == '0' then
      rule = {kind = 'f', cap = cap, window = window, name = format('f%d,', window), start = 0, cur = 0, prev = 0,
        began = window_start(window, now), place = ''}
    end
    if rule then
      -- How a state begins that is this view alone; behind how many bytes (as text, which SETRANGE takes) its numbers stand; and such
      -- a state that holds nothing.
      rule.alone = '1;' .. rule.name
      rule.place = format('%d', #rule.alone)
      if kind == 'b' then
        rule.fresh = rule.alone .. format('0,%d;', now)
      elseif kind == 's' then
        rule.fresh, rule.ahead = rule.alone .. '0,0,0,1,;', ahead_of(window, q)
      else
        rule.fresh = rule.alone .. format(kind == 'c' and '%d,0,0;' or '%d,0;', rule.began)
      end
    elseif not keeps then
      return nil, 'RATETHROTTLE a rule does not fit its kind'
    end
    rules[r], at = rule or false, at + 8
  end
  return rules
end

-- What follows, few calls need, for `views` to make: each function costs every call that makes it, and each of these names every call.
local join, reach_end, push, roll, print_state, read, reach, read_header, print_header
local function views()
  -- Not of the script, since what a function takes from there costs every call that makes the function.
  local EXACT_MAX, WINDOW_MAX, ENTRIES_MAX, EXACT_UNITS, FORMAT, FORMATS = 9007199254740991, 31622400000000, 128, 65, '1', '^[1]([^;]*;)()'
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
  function join(v)
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

  -- How far ahead units may count from: a lease, of whatever version, reaches an eighth of the window at most.
  function reach_end(v)
    return slot_end(v.q, now + floor(v.window / 8))
  end

  function push(v, at, units)
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
    if v.q == 1 and v.total > EXACT_UNITS then
      local gone, excess = 0, v.total - EXACT_UNITS
      local held = units_of(v, 0)
      while held <= excess do
        excess = excess - held
        gone = gone + 1
        held = units_of(v, gone)
      end
      join(v)
      drop(v, gone)
      v.first, v.total = at_of(v, 0), EXACT_UNITS
      set_units(v, 0, held - excess)
    end
  end

  -- Brings the view of a rule's calendar to the window of now, if the end of its own is nearest to the end of that; or it stands ahead.
  local function roll_dated(v, rule)
    local ends, _, after = v.start + v.window, span_of(rule.edges, v.window, rule.ends)
    if v.start - now > v.window then
      v.start = rule.began
      return true
    elseif v.cur == 0 or ends - rule.since <= rule.ends - ends then
      v.start, v.cur = rule.began, 0
    elseif ends - rule.ends <= after - ends then
      v.start = rule.began
    end
    return false
  end

  -- Brings a view to now; true if the clock had stepped backwards. Done again at the same time it changes nothing.
  function roll(v)
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
      if v.last - now > ahead_of(v.window, q) then
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
      while not (first > since) do
        v.total = v.total - units_of(v, gone)
        gone = gone + 1
        first = at_of(v, gone)
      end
      if not (v.total >= v.units) then error('the units of a state are not their sum') end
      v.first = first
      if gone > 0 then drop(v, gone) end
      return rebased
    end
    if v.rule then return roll_dated(v, v.rule) end
    local start, before = v.began, v.start
    if before == start then return false end
    if before > start then
      -- The clock has stepped back, by up to a window: the window that had begun stands until the clock has passed it.
      if before - v.window <= start then return false end
      v.start = start
      return true
    end
    v.start = start
    if kind == 'c' and before == start - v.window then v.prev = v.cur else v.prev = 0 end
    v.cur = 0
    return false
  end

  -- Returns how long until nothing of a rolled view counts any more, 0 if it is fresh, and the view as text.
  local function print_view(v)
    local kind = v.kind
    if kind == 'b' then
      local ticks = v.level + v.drain - 1
      return (ticks - ticks % v.drain) / v.drain, v.name .. format('%d,%d;', v.level, v.t)
    elseif kind == 's' then
      if v.n == 0 then return 0, v.name .. '0,0,0,1,;' end
      return v.last + v.window - now, v.name .. format('%d,%d,%d,%d,', v.units, v.total - v.units, v.last / v.q, v.width)
        .. sub(v.text, v.from, v.from + v.kept * (v.digits + v.width) - 1) .. v.more .. ';'
    end
    local ends = v.start + v.window - now
    if kind == 'f' then return v.cur > 0 and ends or 0, v.name .. format('%d,%d;', v.start, v.cur) end
    return v.cur > 0 and ends + v.window or v.prev > 0 and ends or 0, v.name .. format('%d,%d,%d;', v.start, v.cur, v.prev)
  end

  -- Returns how long until nothing of a state's rolled views counts any more, and the state as text.
  function print_state(head, own, other)
    local reset, text = print_view(own)
    if not other then return reset, head .. text end
    local other_reset, other_text = print_view(other)
    return max(reset, other_reset), head .. text .. other_text
  end

  -- How long what is known of a view may matter to somebody: a bucket may owe twice its capacity, and what is booked.
  function reach(v)
    if v.kind == 'b' then return floor(2 * v.cap * v.unit / v.drain) + 1 + BOOKED_US end
    if v.kind == 's' then return v.window + floor(v.window / 8) + v.q end
    return 2 * v.window
  end

  -- Reads the header of a state with rolled views, and has it as it must be written now: in the present epoch, without what doesn't
  -- matter any more. A table: `since` (whether what is granted is noted: while repairing) and with it `start` (us: when this state
  -- was first touched in the epoch), `granted` (units since then), `told` (us: the server's time, before the epoch, of the newest that was
  -- told of the key; 0 if nothing was), `bases` (text: what its sliding windows had inherited);
  -- `generation` (us of the last reset, or 0); `rest` (of later versions); `keep` (how long the header must be kept).
  function read_header(head, own, other)
    local h, at = {since = repair_us > 0, start = now, granted = 0, told = 0, bases = '', generation = 0, rest = '', keep = repair_us}, 2
    local name, start, granted, told, bases, after = match(head, '^e([0-9]+),([0-9]+),([0-9]+),?([0-9]*)([s0-9,]*)()', at)
    if after then at = after end
    if not h.since then
      h.bases = nil
    elseif name == epoch then
      h.start, h.granted, h.bases = number(start, 0, EXACT_MAX), number(granted, 0, UNITS_MAX), bases
      h.told = told == '' and 0 or number(told, 0, EXACT_MAX)
      if not (h.start and h.granted and h.told) then return nil end
    elseif own.kind == 's' then
      h.bases = format('s%d,%d,%d,0,0', own.window, own.q, own.total)
    end
    local generation
    generation, after = match(head, '^g([0-9]+)()', at)
    if after then
      at, generation = after, number(generation, 0, EXACT_MAX)
      if not generation then return nil end
      local left = max(reach(own), other and reach(other) or 0) - max(0, now - generation)
      if left > 0 then h.generation, h.keep = generation, max(h.keep, left) end
    end
    h.rest = sub(head, at)
    -- What follows must not run into a part that is written before it.
    return find(h.rest, '^[a-dfh-rt-z;]') and h
  end

  function print_header(h)
    local head = FORMAT
    if h.since then
      head = head .. 'e' .. epoch .. format(',%d,%d', h.start, h.granted) .. (h.told > 0 and format(',%d', h.told) or '') .. h.bases
    end
    if h.generation > 0 then head = head .. format('g%d', h.generation) end
    return head .. h.rest
  end

  -- These read the view that begins at `at`. They return it, where its name ends, and where the next one would begin; nothing if it is
  -- none of ours. What is digits needs no tonumber.
  local function read_bucket(state, at)
    local unit, drain, units, name_end, level, t, after = match(state, '^b([0-9]+),([0-9]+),([0-9]+),()([0-9]+),([0-9]+);()', at)
    if not after then return nil end
    unit, drain, units, level, t = unit + 0, drain + 0, units + 0, level + 0, t + 0
    if not (unit >= 1 and drain >= 1 and drain <= 1000000000 and level <= EXACT_MAX and t <= EXACT_MAX) then return nil end
    if not (units >= 1 and units <= 1000000000 and units * unit < TICKS) then return nil end
    return {kind = 'b', unit = unit, drain = drain, cap = units, level = level, t = t}, name_end, after
  end

  local function read_window(state, at, lead)
    local shape = '^s([0-9]+),([0-9]+),()([0-9]+),([0-9]+),([0-9]+),([0-9]+),()'
    local window, q, name_end, units, older, last, width, from = match(state, shape, at)
    local ends = from and find(state, ';', from, true)
    if not ends then return nil end
    window, q, units, width = window + 0, q + 0, units + 0, width + 0
    if not (window >= 1000 and window <= WINDOW_MAX and (q == 1 or q == floor((window + 63) / 64))) then return nil end
    local v = sliding_view(window, q, min(lead or window, floor(window / 8)))
    v.units, v.total, v.last, v.width = units, units + older, last * q, width
    if not (units <= UNITS_MAX and width >= 1 and width <= 10) then return nil end
    if not (v.total <= ENTRIES_MAX * UNITS_MAX and v.last <= EXACT_MAX) then return nil end
    v.text, v.from, v.kept, v.more = state, from, (ends - from) / (v.digits + width), ''
    if v.kept % 1 ~= 0 or v.kept >= ENTRIES_MAX or (units == 0) ~= (v.total == 0) then return nil end
    v.n = v.total > 0 and v.kept + 1 or 0
    return v, name_end, ends + 1
  end

  local function read_count(state, at, kind)
    local window, name_end, start, cur, prev, after = match(state, '^.([0-9]+),()([0-9]+),([0-9]+),?([0-9]*);()', at)
    if not after or (prev == '') ~= (kind == 'f') then return nil end
    window, start, cur, prev = window + 0, start + 0, cur + 0, kind == 'f' and 0 or prev + 0
    if not (window >= 1000 and window <= WINDOW_MAX and start <= EXACT_MAX and cur <= UNITS_MAX and prev <= UNITS_MAX) then return nil end
    local v = {kind = kind, window = window, start = start, cur = cur, prev = prev, began = window_start(window, now)}
    if start ~= window_start(window, start) then
      -- Weeks began on a Thursday before there was a release: such a one counts in the next.
      if start % window ~= 0 then return nil end
      v.start = window_start(window, start) + window
    end
    return v, name_end, after
  end

  -- Of a calendar that this call doesn't have, only the mean length of a window is known.
  local function read_dated(state, at)
    local id, window, name_end, start, cur, after = match(state, '^d([0-9]+),([0-9]+),()([0-9]+),([0-9]+);()', at)
    if not after then return nil end
    id, window, start, cur = id + 0, window + 0, start + 0, cur + 0
    if not (id >= 1 and id <= TICKS and window >= 1000 and window <= WINDOW_MAX and start <= EXACT_MAX and cur <= UNITS_MAX) then return nil end
    return {kind = 'f', id = id, window = window, start = start, cur = cur, prev = 0, began = now - (now - start) % window}, name_end, after
  end

  -- Makes the rule its own view, from the rolled view that holds most: a definition between the two may have released, or never have
  -- known, what the other one counts. Returns whether it holds anything, and in how many entries.
  local function derive(rule, views, count)
    local source, used, kind = nil, 0, rule.kind
    for i = 1, count do
      local v = views[i]
      local held = v.total
      if v.kind == 'b' then
        held = floor((v.level + v.unit - 1) / v.unit)
      elseif v.kind ~= 's' then
        held = v.overlaps or v.cur + v.prev
      end
      if held > used then source, used = v, held end
    end
    if kind == 'b' then
      rule.level, rule.t = min(used, rule.cap) * rule.unit, now
    elseif kind ~= 's' then
      rule.start, rule.cur, rule.prev = rule.began, min(used, UNITS_MAX), 0
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
      return rule.n > 0, rule.n
    end
    return used > 0, 0
  end

  -- Reads a state. Returns its header, the own view, the other one (rolled) or nil, whether there is something to write already, whether
  -- the own one was derived, and of how many entries; nothing if the state can't be read. It raises
  -- an error where entries of a sliding window aren't digits, or aren't what their sum says: to look through them all would take too
  -- long. All other numbers are in the ranges that rules and views have.
  function read(state, rule)
    local head, at = match(state, FORMATS)
    if not head then return nil end
    head = FORMAT .. head
    local views, size, count, lead = {}, #state, 0, rule.lead
    while at <= size do
      local kind, v, name_end, after = sub(state, at, at), nil, nil, nil
      if kind == 'b' then
        v, name_end, after = read_bucket(state, at)
      elseif kind == 's' then
        v, name_end, after = read_window(state, at, lead)
      elseif kind == 'f' or kind == 'c' then
        v, name_end, after = read_count(state, at, kind)
      elseif kind == 'd' then
        v, name_end, after = read_dated(state, at)
      end
      count = count + 1
      if not v or count > 2 then return nil end
      v.name = sub(state, at, name_end - 1)
      views[count], at = v, after
    end

    for i = 1, count do
      local v = views[i]
      -- The name of a bucket holds its capacity too, and that doesn't make it another one.
      if v.name == rule.name or v.kind == 'b' and rule.kind == 'b' and v.unit == rule.unit and v.drain == rule.drain then
        local other = views[3 - i]
        if rule.id then v.rule = rule end
        return head, v, other, other and roll(other), false
      end
    end
    local changed = false
    for i = 1, count do
      local v = views[i]
      -- A calendar's window takes over the units of each other one that it overlaps.
      if rule.id and v.id and v.start + v.window > rule.since then v.overlaps = v.cur end
      if roll(v) then changed = true end
    end
    local holds, pushed = derive(rule, views, count)
    return head, rule, views[1], changed or holds, true, pushed
  end

  return read, roll, push, read_header, print_header, print_state, units_of, at_of, place_of, set_units
end

-- What the keys hold, by place in KEYS: text, false if nothing, and '' if it is no text: MGET takes that for absent, and nobody can read it.
-- A call with more keys than there may be is refused before this is used.
local states, absent, absent_count = #KEYS > 0 and #KEYS <= 130 and call('MGET', unpack(KEYS)) or {}, nil, 0
for k = 2, #states do
  if not states[k] then
    absent, absent_count = absent or {nil}, absent_count + 1
    absent[absent_count] = KEYS[k]
  end
end
if absent and call('EXISTS', unpack(absent)) > 0 then
  for k = 2, #states do
    if not states[k] and call('TYPE', KEYS[k]).ok ~= 'none' then states[k] = '' end
  end
end
