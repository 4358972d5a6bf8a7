-- Joint checks, whose parts are granted all or none. decide.lua includes this if a call has such, so that no other call makes these
-- functions. The parts of a joint check are charged one after the other, as items are, and mostly that is all. If a set of them grants
-- less than was asked, the states are put back. It is known then how many of the equal checks all sets grant: just these are charged.
local parts_at = right - 5 * part_count

-- The bits of a part of a check, and of one that books or unbooks. Another one corrects.
local checks = {['0'] = true, ['1'] = true, ['3'] = true, ['4'] = true, ['5'] = true}
local books = {['32'] = true, ['64'] = true, ['128'] = true}
local EQUAL = 1048576

-- Returns how many equal ones a part stands for; if it gives back, when its units were granted, or when the bucket would have been empty; if
-- it books, how many there are, and how far ahead their turns may be.
local function count_of(text, bits)
  if bits == '16' or bits == '17' or bits == '128' then return number(text, 0, 9007199254740991) end
  if books[bits] then
    local both = number(text, 1, (BOOKED_US + 1) * EQUAL - 1)
    local count = both and both % EQUAL
    if not both or count < 1 or count > 1000000 then return nil end
    return count, (both - count) / EQUAL
  end
  return number(text, 1, checks[bits] and 1000000 or 1)
end

-- Returns what is wrong with the parts, or nothing. `decide_parts` raises an error where something is, but can't say what.
function check_parts()
  local from, count, before = parts_at, nil, '4'
  for _ = 1, part_count do
    local k, rule, cost = number(ARGV[from + 1], 1, key_count), number(ARGV[from + 2], 1, rule_count), number(ARGV[from + 3], 1, 1000000000)
    local bits, together = ARGV[from + 5], ARGV[from + 4]
    if not (k and rule and cost and count_of(together, bits)) then return 'RATETHROTTLE a number of a part is out of range' end
    if bits == '0' or bits == '4' then
      count = together
    elseif consumes and books[bits] then
      if rules[rule].kind ~= 'b' then return 'RATETHROTTLE only buckets are booked' end
      count = nil
    elseif consumes and (bits == '8' or bits == '16') then
      count = false
    elseif bits == '9' or bits == '17' then
      if count ~= false then return 'RATETHROTTLE a part does not fit the one before' end
    elseif not (bits == '1' or bits == '5' or bits == '3' and before ~= '4' and before ~= '5') or together ~= count then
      return 'RATETHROTTLE a part does not fit the one before'
    end
    before, from = bits, from + 5
  end
end

-- Makes what only those joint checks need that aren't simple, or not granted in full, and peeks. By number of the part from 1, `kept` is
-- what its state was, and after part_count others what `resets` and `numbers` were; `takes`, how many of the equal checks it pays for.
local function settling(kept, takes, reply, items, generations, decide_item, work)
  local SKIPPED, DEFERRED, WORK_MAX = -5, -4, 700
  -- By number of the part: why it can't be decided, and when its key was reset. Of the joint check that begins with the part `current`,
  -- whether those parts have to be asked anew that aren't simple.
  local codes, resets_at, current, busy, correct_item, book_item = {nil}, {nil}, 0, false, nil, nil
  if not decide_item then
    decide_item, correct_item, book_item = long_way(states, resets, numbers, reply, repair_us > 0, untold_us, now, sub, floor, min, max)
  end

  local function key_of(i)
    return ARGV[parts_at + 5 * i - 4] + 1
  end

  -- Returns whether a part begins a set, and whether that never vetoes.
  local function set_of(i)
    local bits = ARGV[parts_at + 5 * i]
    return bits ~= '3', bits == '4' or bits == '5'
  end

  -- Decides `count` checks of a part, and puts the answer behind `filled` numbers. Returns where it ends, and how many were granted.
  local function decide_part(first, i, count, consumes, filled)
    if first ~= current then current, busy = first, work > WORK_MAX end
    local k, place, took = key_of(i), filled + 1, 0
    if busy then
      reply[place], filled = DEFERRED, place
    else
      local rule, cost = rules[ARGV[parts_at + 5 * i - 3] + 0], ARGV[parts_at + 5 * i - 2] + 0
      filled, took, resets_at[i] = decide_item(k, states[k], rule, cost, count, consumes, filled)
    end
    work = work + took
    if reply[place] < 0 then codes[i] = reply[place] end
    return filled, reply[place]
  end

  -- From the last on, so that of a key that stands there twice the first counts.
  local function put_back(first, last)
    for i = last, first, -1 do
      local k = key_of(i)
      states[k], resets[k], numbers[k] = kept[i], kept[part_count + i], kept[2 * part_count + i]
    end
  end

  -- Charges, gives back or books, in its turn. Returns where the answer ends, how many were taken, and whether it could be.
  local function correct(first, i, bits, filled)
    if first ~= current then current, busy = first, work > WORK_MAX end
    local at, place, took, back, booking = parts_at + 5 * i, filled + 1, 0, bits == '16' or bits == '17', books[bits]
    local count, ahead = count_of(ARGV[at - 1], bits)
    local known, begins = back or booking or bits == '8' or bits == '9', bits == '8' or bits == '16' or booking
    if not (count and known) or (begins or false) ~= (i == first) then error('a part is malformed') end
    if busy then
      reply[place], filled = DEFERRED, place
    else
      if not correct_item then
        decide_item, correct_item, book_item = long_way(states, resets, numbers, reply, repair_us > 0, untold_us, now, sub, floor, min, max)
      end
      local k, rule, units = key_of(i), rules[ARGV[at - 3] + 0], ARGV[at - 2] + 0
      if not booking then
        filled, took, resets_at[i] = correct_item(k, states[k], rule, units, back and count, filled)
      elseif rule.kind == 'b' then
        filled, took, resets_at[i] = book_item(k, states[k], rule, units, count, ahead, bits == '64', filled)
      else
        error('a part is malformed')
      end
    end
    work = work + took
    if reply[place] < 0 then codes[i] = reply[place] end
    return filled, codes[i] and 0 or ahead and reply[place] or 1, not codes[i]
  end

  -- Decides a part that isn't simple, in its turn. Returns where its answer ends, how many were granted, and whether it could be decided.
  local function decide_long(first, i, kind, count, filled)
    local bits, granted = ARGV[parts_at + 5 * i], nil
    if not (checks[bits] and checks[ARGV[parts_at + 5 * first]]) then return correct(first, i, bits, filled) end
    filled, granted = decide_part(first, i, count, true, filled)
    -- If it takes nothing, nothing is written, not even that the clock was set back.
    if granted <= 0 then put_back(i, i) end
    -- Only one that never vetoes says until when it has no more, although it has granted some.
    if granted > 0 and granted < count and kind == 's' and bits ~= '4' and bits ~= '5' then reply[filled], filled = nil, filled - 1 end
    return filled, max(granted, 0), granted >= 0
  end

  -- Charges for as many of the equal checks as all sets grant. Before that, takes[i] is how many its part alone would grant.
  local function charge_least(first, last, filled)
    local least, left, sum = ARGV[parts_at + 5 * first - 1] + 0, 0, 0
    for i = first, last do
      sum = sum + takes[i]
      if i == last or set_of(i + 1) then
        local _, flagged = set_of(i)
        if sum < least and not flagged then least = sum end
        sum = 0
      end
    end
    for i = first, last do
      if set_of(i) then left = least end
      local take = min(left, takes[i])
      takes[i], left = take, left - take
      if take > 0 then decide_part(first, i, take, true, filled) end
    end
  end

  -- Puts behind `filled` numbers what one more check would hear of each part, or why the joint check can't be decided, and removes what
  -- stands there up to `reached`. Returns how many numbers there are then, and whether it could be decided.
  local function look(first, last, filled, reached, fine)
    local begun, asked = filled, ARGV[parts_at + 5 * first - 1] + 0
    for i = first, fine and last or 0 do
      local place, granted = filled + 1, nil
      filled, granted = decide_part(first, i, 1, false, place)
      local _, flagged = set_of(i)
      if granted > 0 and flagged and takes[i] < asked and rules[ARGV[parts_at + 5 * i - 3] + 0].kind == 's' then
        filled = filled + 1
        reply[filled] = 0
      end
      reply[place], fine = takes[i], fine and granted >= 0
    end
    if filled > reached then reached = filled end
    if not fine then
      filled = begun
      for i = first, last do
        reply[filled + 1], reply[filled + 2], filled = 0, codes[i] or SKIPPED, filled + 2
      end
    end
    for i = filled + 1, reached do reply[i] = nil end
    return filled, fine
  end

  -- Has a joint check that wasn't granted in full, or couldn't be decided, do what it may from what its keys had before.
  local function settle(first, last, begun, filled, fine)
    put_back(first, last)
    if fine then charge_least(first, last, begun) end
    local ending, decided = look(first, last, begun, filled, fine)
    if fine and not decided then put_back(first, last) end
    return ending, decided
  end

  -- Notes when the keys of a joint check were reset.
  local function note(first, last)
    for i = first, last do
      local size = #generations
      if resets_at[i] then generations[size + 1], generations[size + 2] = items + i, resets_at[i] end
    end
  end

  return decide_long, settle, look, note
end

-- Decides joint checks that consume, in one pass over their parts. Returns what `decide` does, as far as it is used. Raises an error if a
-- part is malformed. Tables have room for all parts at once: to set something behind the end of one, even nil, takes as long as to count
-- all that it holds.
local function decide_parts(part_count, from, settling, window_start, reply, partly, filled, items, generations, decide_item, work,
    states, ends, resets, numbers, places, _, rules, _, repairing, _, now, _, _, _, rule_count, _, _, _, ARGV, number, _, format, match, sub,
    find, floor, min, _, unpack)
  local EXACT_MAX, UNITS_MAX, SUM_MAX, SECOND, SKIPPED = 9007199254740991, 4000000000, 512000000000, 1000000, -5
  local kept, takes, rule_of, units_of = {unpack({}, 1, 3 * part_count)}, {unpack({}, 1, part_count)}, {}, {['1'] = 1, [false] = 1}
  local first, begun, left, whole, fine, flagged = 1, filled, 0, true, true, true
  local together, decide_long, settle, note, _
  for i = 1, part_count + 1 do
    local bits = ARGV[from + 5]
    if bits ~= '3' then
      -- The set before ends, and maybe its joint check.
      if left > 0 and not flagged then whole = false end
      if bits ~= '1' and bits ~= '5' and (together or bits ~= '9' and bits ~= '17') then
        if not (whole and fine) then
          if not settle then decide_long, settle, _, note = settling(kept, takes, reply, items, generations, decide_item, work) end
          filled, fine = settle(first, i - 1, begun, filled, fine)
        end
        if note and fine then note(first, i - 1) end
        if i > part_count then break end
        first, begun, whole, fine, together = i, filled, true, true, (bits == '0' or bits == '4') and ARGV[from + 4]
        units_of[together] = units_of[together] or number(together, 1, 1000000)
      end
      left, flagged = units_of[together] <= 1000000 and units_of[together], bits ~= '0' and bits ~= '1'  -- a cost may be larger
    end
    local k, rule, cost = ARGV[from + 1] + 1, rule_of[ARGV[from + 2]], units_of[ARGV[from + 3]]
    if not (rule and cost) then
      rule, cost = rules[number(ARGV[from + 2], 1, rule_count)], number(ARGV[from + 3], 1, 1000000000)
      if not (rule and cost) then error('a part is malformed') end
      rule_of[ARGV[from + 2]], units_of[ARGV[from + 3]] = rule, cost
    end
    local kind, cap, alone, fresh, window = rule.kind, rule.cap, rule.alone, rule.fresh, rule.window
    local unit, drain, q, digits, modulus = rule.unit, rule.drain, rule.q, rule.digits, rule.modulus
    local skip, state, done, place, simple, count = #alone, states[k], false, filled + 1, together and not repairing, ARGV[from + 4]
    if state == nil or k == 1 or count ~= (together or flagged and count) or bits == '3' and flagged then error('a part is malformed') end
    if partly and numbers[k] then
      state = sub(state, 1, places[k]) .. numbers[k] .. sub(state, places[k] + #numbers[k] + 1)
      states[k] = state
    end
    if resets[k] or numbers[k] then kept[part_count + i], kept[2 * part_count + i] = resets[k], numbers[k] end
    kept[i], filled, from = state, place, from + 5
    if left == 0 then
      -- The alternatives before it pay for all.
      reply[place], reply[place + 1], takes[i], filled = 0, SKIPPED, 0, place + 1
    else
      local count, asked, granted, decided = left, left * cost, nil, true

      -- include simple.lua

      if done then
        granted = reply[place + 1]
      else
        if not settle then decide_long, settle, _, note = settling(kept, takes, reply, items, generations, decide_item, work) end
        filled, granted, decided = decide_long(first, i, kind, count, filled)
        fine = fine and decided
      end
      reply[place], takes[i], left = granted, granted, left - granted
    end
  end
  return reply, partly, filled, items, generations
end

-- Looks at all parts of joint checks, and charges nothing. Returns the same.
local function look_parts(reply, partly, filled, items, generations, decide_item, work)
  local takes, first, fine, look, note, _ = {nil}, 1, nil, nil, nil, nil
  _, _, look, note = settling({nil}, takes, reply, items, generations, decide_item, work)
  for i = 1, part_count do
    local following = ARGV[parts_at + 5 * (i + 1)]
    takes[i] = 0
    if not following or following == '0' or following == '4' then
      filled, fine = look(first, i, filled, filled, true)
      if fine then note(first, i) end
      first = i + 1
    end
  end
  return reply, partly, filled, items, generations
end

-- Decides runs and leases, and then the parts.
function attempt(...)
  local reply, partly, filled, items, generations, decide_item, work = decide(...)
  if reply.err then return reply end
  if items + part_count > 128 then return refuse('RATETHROTTLE there are more than 128 items') end
  generations = generations or {nil}
  if consumes then
    return decide_parts(part_count, parts_at, settling, window_start, reply, partly, filled, items, generations, decide_item, work, ...)
  end
  local wrong = check_parts()
  if wrong then return refuse(wrong) end
  return look_parts(reply, partly, filled, items, generations, decide_item, work)
end
