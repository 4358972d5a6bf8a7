-- The long way to decide an item, for decide.lua: any state and any item, step by step as docs/arithmetic.md has it. The loader puts it
-- in front of that. simple.lua is its twin for most items. What this makes, few calls need.

-- Makes what only such items need, for one reading of a call's states. Returns `decide_item` and `correct_item`.
local function long_way(states, resets, numbers, reply, repairing, untold_us, now, sub, floor, min, max)
  local TICKS, UNITS_MAX, EXACT_UNITS, PLAIN, UNREADABLE, UNSURE = 4503599627370496, 4000000000, 65, '1;', -2, -3
  local EXACT_MAX = 9007199254740991
  local read, roll, push, read_header, print_header, print_state, units_of, at_of, place_of, set_units = views()

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

  -- Takes back units of an earlier lease from the own view; true if there were any.
  local function give_back(v, lead, back, back_us)
    local kind, given = v.kind, 0
    if kind == 'b' then
      given = min(v.level, max(0, min(back, floor(TICKS / v.unit)) * v.unit - v.drain * max(0, now - back_us)))
      v.level = v.level - given
    elseif kind ~= 's' then
      local start
      if v.id then
        local _, ends = span_of((v.rule or v).edges, v.window, back_us)
        start = ends - v.window
      else
        start = window_start(v.window, back_us)
      end
      if start == v.start then
        given = min(v.cur, back)
        v.cur = v.cur - given
      end
    else
      -- Units that a full window has forgotten may be just these. What came with them, or after them, is others'.
      if v.q == 1 and v.total >= EXACT_UNITS then return false end
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

  -- Units that are free; negative if a limit was lowered.
  local function free_of(own, rule)
    local kind, cap = rule.kind, rule.cap
    if kind == 'b' then
      local free = cap * own.unit - own.level
      return (free - free % own.unit) / own.unit
    elseif kind == 's' then
      return cap - own.total
    elseif kind == 'f' then
      return cap - own.cur
    end
    -- A window that begins only after now, by this clock, counts as it will when it begins.
    local span, past, cur, prev = rule.span, max(0, now - own.start), own.cur, own.prev
    if cur > cap then cur = cap end
    if prev > cap then prev = cap end
    local free = (cap - cur) * span - prev * (span - floor(past / rule.coarse))
    return (free - free % span) / span
  end

  -- Counts in the other view what was granted, and taken ahead, in the own one.
  local function charge_other(other, units, ahead)
    if other.kind == 'b' then
      -- A definition never owes more than its capacity for what another one admitted.
      other.level = min(other.level + min(units + ahead, other.cap) * other.unit, max(other.level, other.cap * other.unit))
    else
      charge(other, units, ahead)
    end
  end

  -- Makes the rule a fresh view of its own.
  local function begin(rule)
    if rule.kind == 'b' then
      rule.level, rule.t = 0, now
    elseif rule.kind == 's' then
      rule.n, rule.total = 0, 0
    else
      rule.start, rule.cur, rule.prev = rule.began, 0, 0
    end
  end

  -- Puts the answer of a sliding window behind `filled` numbers of the reply, that of what was granted among them. Returns how many there
  -- are then, and how much work that was.
  local function answer_window(own, cap, cost, denied, filled)
    local first, reset, work = 0, 0, 0
    if own.n > 0 then first, reset = own.first + own.window - now, own.last + own.window - now end
    reply[filled + 1], reply[filled + 2], reply[filled + 3], filled = own.total, first, reset, filled + 3
    if denied then
      local retry = -1
      if cost <= cap then
        -- When enough has left, from the oldest on.
        local excess, j = own.total + cost - cap, 0
        while excess > 0 do
          excess = excess - units_of(own, j)
          j = j + 1
        end
        work = j / 2
        retry = j > 0 and at_of(own, j - 1) + own.window - now or 0
        if not (retry >= 0) then error('the entries of a state do not ascend') end
      end
      filled = filled + 1
      reply[filled] = retry
    end
    return filled, work
  end

  -- Reads a state and brings it to now. Returns the text of its header, the own view and the other one, whether there is something to write
  -- already, whether the own one was derived, and of how many entries, and the header if it says anything. If it can't be decided, nil and
  -- the code that says so.
  local function open(state, rule)
    local head, own, other, changed, derived, pushed, h = PLAIN, rule, nil, false, false, 0, nil
    if state then head, own, other, changed, derived, pushed = read(state, rule) else begin(rule) end
    if head and roll(own) then changed = true end
    if head and (repairing or head ~= PLAIN) then
      h = read_header(head, own, other)
      head = h and head
    end
    if not head or h and h.told < untold_us then return nil, head and UNSURE or UNREADABLE end
    return head, own, other, changed, derived, pushed or 0, h
  end

  -- Has the state of the key at k written. Returns about how many us that takes.
  local function keep(k, head, own, other, h)
    local reset, text = print_state(h and print_header(h) or head, own, other)
    if h and h.keep > reset then reset = h.keep end
    states[k], resets[k], numbers[k] = reset > 0 and text, reset, nil
    return (own.kind == 's' and own.n / 8 or 0) + (other and 1 + (other.kind == 's' and other.n / 4 or 0) or 0)
  end

  -- Puts an answer behind `filled` numbers of the reply. Returns how many there are then, and how much work that was.
  local function answer(own, rule, cost, granted, denied, filled)
    local kind, work = rule.kind, 0
    filled = filled + 1
    reply[filled] = granted
    if kind == 'b' then
      filled = filled + 1
      reply[filled] = own.level
    elseif kind == 's' then
      filled, work = answer_window(own, rule.cap, cost, denied, filled)
    elseif kind == 'f' then
      reply[filled + 1], reply[filled + 2], filled = own.cur, now - own.start, filled + 2
    else
      reply[filled + 1], reply[filled + 2], reply[filled + 3], filled = own.cur, own.prev, now - own.start, filled + 3
    end
    return filled, work
  end

  -- Charges a key in all its views, under a rule.
  local function charge_all(own, other, h, rule, units, ahead)
    charge(own, units, ahead)
    if other then charge_other(other, units, ahead) end
    if h then h.granted = min(h.granted + units + ahead, UNITS_MAX) end
    own.name = rule.name
  end

  -- Charges the key at k for units that nobody was asked for, up to a debt of one capacity; or, if it is known when they were granted,
  -- gives them back. Answers as of one check, which is granted unless the key is in debt, and says how long that lasts. Returns what
  -- decide_item does.
  local function correct_item(k, state, rule, units, granted_us, filled)
    local head, own, other, changed, derived, pushed, h = open(state, rule)
    if not head then
      reply[filled + 1] = own
      return filled + 1, 2
    end
    -- If nothing comes back, nothing is written, not even that the clock was set back.
    if granted_us then
      changed = not derived and not (h and h.generation >= granted_us) and give_back(own, 0, units, granted_us)
    else
      local room = rule.kind == 'c' and 2 * rule.cap - own.cur or rule.cap + free_of(own, rule)
      units = min(units, max(0, room))
      if units > 0 then
        charge_all(own, other, h, rule, units, 0)
        changed = true
      end
    end
    local work, more = 4 + 5 * pushed, 0
    if changed then work = work + keep(k, head, own, other, h) end
    local owes = free_of(own, rule) < 0 or rule.kind == 'c' and own.cur > rule.cap
    filled, more = answer(own, rule, 0, owes and 0 or 1, owes, filled)
    return filled, work + more, h and h.generation > 0 and h.generation
  end

  -- Books for `count` checks of the key at k, which is a bucket's, as many as have their turn within `ahead` us. Without that, gives back a
  -- booking if the bucket is empty at `count` yet, so that nobody has booked behind it. Answers like correct_item, with how many were
  -- booked for whether it is in debt. Returns what decide_item does.
  local function book_item(k, state, rule, units, count, ahead, evenly, filled)
    local head, own, other, changed, derived, pushed, h = open(state, rule)
    if not head then
      reply[filled + 1] = own
      return filled + 1, 2
    end
    local ticks, level, granted, work = units * rule.unit, own.level, 1, 4 + 5 * pushed
    if ahead then
      -- What isn't exact here is above EXACT_MAX anyway.
      local most = (evenly and units or rule.cap) * rule.unit + ahead * rule.drain
      local room = units <= rule.cap and max(0, min(most, EXACT_MAX) - level) or 0
      granted = min(count, (room - room % ticks) / ticks)
      if granted > 0 then
        charge_all(own, other, h, rule, granted * units, 0)
        changed = true
      end
    else
      local left = level + own.drain - 1
      -- What was used before a reset could be others' by now.
      if not derived and not (h and h.generation > 0) and now + (left - left % own.drain) / own.drain == count then
        own.level = level - min(level, ticks)
      end
      changed = own.level < level  -- as in correct_item
      granted = own.level <= rule.cap * rule.unit and 1 or 0
    end
    if changed then work = work + keep(k, head, own, other, h) end
    return answer(own, rule, 0, granted, false, filled), work, h and h.generation > 0 and h.generation
  end

  -- Decides `count` checks of the key at k, whose state is given, and charges for them if it `consumes`. Of a lease, `wanted` is how many
  -- units it would take ahead (nil: it is none), and `back` how many of those of back_us it gives back. Puts the answer behind `filled`
  -- numbers of the reply. Returns how many there are then, about how many us this took, and when the key was reset, if it was.
  local function decide_item(k, state, rule, cost, count, consumes, filled, wanted, back, back_us)
    local head, own, other, changed, derived, pushed, h = open(state, rule)
    if not head then
      reply[filled + 1] = own
      return filled + 1, 2
    end
    -- A view that was derived just now doesn't hold the lease's units as such, nor one that was reset since they were taken.
    local gives = wanted and back > 0 and not derived and not (h and h.generation >= back_us)
    if gives and give_back(own, rule.lead, back, back_us) then changed = true end

    local work, free, granted, ahead, units, more = 4 + 5 * pushed, free_of(own, rule), count, 0, count * cost, 0
    if units > free then
      granted = free > 0 and floor(free / cost) or 0
      units = granted * cost
    end
    if consumes then
      if wanted and wanted > 0 and granted == count then ahead = min(wanted, max(0, floor((free - units) / 8))) end
      if units + ahead > 0 then
        charge_all(own, other, h, rule, units, ahead)
        changed = true
      end
      if changed then work = work + keep(k, head, own, other, h) end
    else
      granted = min(granted, 1)
    end
    filled, more = answer(own, rule, cost, granted, granted < count, filled)
    if wanted then
      filled = filled + 1
      reply[filled] = ahead
    end
    return filled, work + more, h and h.generation > 0 and h.generation
  end

  return decide_item, correct_item, book_item
end
