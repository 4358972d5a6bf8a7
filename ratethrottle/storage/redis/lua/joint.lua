-- Joint checks, whose parts are granted all or none. decide.lua includes this where a call has such, so that no other call makes these
-- functions. The parts of a joint check are charged one after the other, as entries are, and mostly that is all. If a set of them grants
-- less than was asked, the states are put back. It is known then how many of the equal checks all sets grant: just these are charged.
local SKIPPED, DEFERRED, WORK_MAX = -5, -4, 700
-- By number of the part, from 1: `keys` by place in KEYS; `bits` as text; what the states were before; `takes`, how many of the checks it
-- pays for; `codes`, why it can't be decided; `resets_at`, when its key was reset.
local keys, part_rules, costs, counts, bits = {nil}, {nil}, {nil}, {nil}, {nil}
local kept_states, kept_resets, kept_numbers, takes, codes, resets_at = {nil}, {nil}, {nil}, {nil}, nil, nil
local reply, decide_entry, work

-- Takes in the parts that begin behind ARGV[from]. Returns what is wrong with them, or nothing. Raises an error where there is no number.
local function read_parts(from)
  local known, seen, joint, together = {['1'] = 1}, {unpack(ends, 1, key_count + 1)}, 0, nil
  local function learn(text)
    known[text] = number(text, 1, 1000000000)
    return known[text]
  end
  for i = 1, part_count do
    local k, rule, cost, count, bit = ARGV[from + 1] + 1, ARGV[from + 2], ARGV[from + 3], ARGV[from + 4], ARGV[from + 5]
    rule, cost, count = rules[known[rule] or learn(rule)], known[cost] or learn(cost), known[count] or learn(count)
    if not (k >= 2 and k <= key_count + 1 and k % 1 == 0 and rule and cost and count and count <= 1000000) then
      return 'RATETHROTTLE a number of a part is out of range'
    end
    if bit == '0' or bit == '4' then
      joint, together = joint + 1, count
    elseif not (bit == '1' or bit == '5' or bit == '3' and bits[i - 1] ~= '4' and bits[i - 1] ~= '5') or together ~= count then
      return 'RATETHROTTLE a part does not fit the one before'
    end
    if seen[k] == joint then return 'RATETHROTTLE a joint check names a key twice' end
    seen[k], keys[i], part_rules[i], costs[i], counts[i], bits[i], from = joint, k, rule, cost, count, bit, from + 5
  end
end

local function decide_long(i, state, count, consumes, filled)
  decide_entry = decide_entry or long_way(states, resets, numbers, reply, repair_us > 0, untold_us, now, sub, floor, min, max)
  local took
  filled, took, resets_at[i] = decide_entry(keys[i], state, part_rules[i], costs[i], count, consumes, filled)
  work = work + took
  return filled
end

local function put_back(first, last)
  for i = first, last do
    local k = keys[i]
    states[k], resets[k], numbers[k] = kept_states[i], kept_resets[i], kept_numbers[i]
  end
end

-- Charges for as many of the equal checks as all sets grant. Before that, takes[i] is how many its part alone would grant.
local function charge_least(first, last, filled)
  local least, sum, left = counts[first], 0, 0
  for i = first, last do
    sum = sum + takes[i]
    if bits[i + 1] ~= '3' then
      if sum < least and bits[i] ~= '4' and bits[i] ~= '5' then least = sum end
      sum = 0
    end
  end
  for i = first, last do
    if bits[i] ~= '3' then left = least end
    local take = min(left, takes[i])
    takes[i], left = take, left - take
    if take > 0 then decide_long(i, states[keys[i]], take, true, filled) end
  end
end

-- Puts into the reply what one more check would hear of each part. Returns how many numbers there are then, and whether all can be decided.
local function look(first, last, filled)
  local fine = true
  for i = first, last do
    local place = filled + 1
    filled = decide_long(i, states[keys[i]], 1, false, place)
    if reply[place + 1] < 0 then codes[i], fine = reply[place + 1], false end
    reply[place] = takes[i]
  end
  return filled, fine
end

-- Answers for a joint check that isn't decided: nothing is charged. If it is put off as a whole, it is so for each part.
local function leave_out(first, last, filled, deferred)
  for i = first, last do
    reply[filled + 1], reply[filled + 2], filled = 0, codes[i] or deferred and DEFERRED or SKIPPED, filled + 2
  end
  return filled
end

-- Has a joint check, not all of which was granted or could be decided, do what it may, from what its keys had before.
local function settle(first, last, begun, filled, fine, busy)
  local reached, looked = filled, fine and not busy
  put_back(first, last)
  if looked then
    charge_least(first, last, begun)
    filled, fine = look(first, last, begun)
    if not fine then put_back(first, last) end
    reached = max(reached, filled)
  end
  if not (looked and fine) then filled, fine = leave_out(first, last, begun, fine), false end
  for i = filled + 1, reached do reply[i] = nil end
  return filled, fine
end

-- Decides joint checks that consume. Returns whether there are states of which only numbers change, and how many numbers the reply holds.
local function decide_parts(partly, filled, note)
  local EXACT_MAX, UNITS_MAX, SUM_MAX, SECOND, now, reply = 9007199254740991, 4000000000, 512000000000, 1000000, now, reply
  local states, ends, resets, numbers, places, keys, part_rules, costs, bits = states, ends, resets, numbers, places, keys, part_rules, costs, bits
  local match, format, sub, find, floor, first, begun, left = match, format, sub, find, floor, 1, filled, 0
  local simple = repair_us == 0
  local whole, fine, busy = true, true, work > WORK_MAX
  for i = 1, part_count do
    local k, rule, cost, bit, following = keys[i], part_rules[i], costs[i], bits[i], bits[i + 1]
    local kind, cap, alone, fresh, window = rule.kind, rule.cap, rule.alone, rule.fresh, rule.window
    local unit, drain, q, digits, modulus = rule.unit, rule.drain, rule.q, rule.digits, rule.modulus
    local skip, state, done, place = #alone, states[k], false, filled + 1
    if partly and numbers[k] then
      state = sub(state, 1, places[k]) .. numbers[k] .. sub(state, places[k] + #numbers[k] + 1)
      states[k] = state
    end
    kept_states[i], kept_resets[i], kept_numbers[i] = state, resets[k], numbers[k]
    if bit ~= '3' then left = counts[i] end
    filled = place
    if left == 0 then
      -- The alternatives before it pay for all.
      reply[place], reply[place + 1], takes[i], filled = 0, SKIPPED, 0, place + 1
    else
      local count, asked = left, left * cost

      -- include simple.lua

      if not done and busy then
        reply[place + 1], filled = DEFERRED, place + 1
      elseif not done then
        filled = decide_long(i, state, count, true, place)
      end
      local granted = reply[place + 1]
      if granted < count and not done then
        -- Of what takes nothing, nothing is written, not even that the clock was set back.
        if granted <= 0 then states[k], resets[k], numbers[k] = state, kept_resets[i], kept_numbers[i] end
        if granted > 0 and kind == 's' then reply[filled], filled = nil, filled - 1 end
        if granted < 0 then codes[i], granted, fine = granted, 0, false end
      end
      reply[place], takes[i], left = granted, granted, left - granted
    end
    if following ~= '3' then
      if left > 0 and bit ~= '4' and bit ~= '5' then whole = false end
      if following ~= '1' and following ~= '5' then
        if not (whole and fine) then filled, fine = settle(first, i, begun, filled, fine, busy) end
        if decide_entry and fine then note(first, i) end
        first, begun, whole, fine, busy = i + 1, filled, true, true, work > WORK_MAX
      end
    end
  end
  return partly, filled
end

-- Decides joint checks that consume nothing. Returns how many numbers the reply holds.
local function look_parts(filled, note)
  local first = 1
  for i = 1, part_count do
    local following = bits[i + 1]
    takes[i] = 0
    if following == nil or following == '0' or following == '4' then
      local begun, fine, reached = filled, false, nil
      if work > WORK_MAX then
        filled = leave_out(first, i, begun, true)
      else
        reached, fine = look(first, i, begun)
        filled = fine and reached or leave_out(first, i, begun)
        for j = filled + 1, reached do reply[j] = nil end
      end
      if fine then note(first, i) end
      first = i + 1
    end
  end
  return filled
end

local fine, wrong = pcall(read_parts, right - 5 * part_count)
if not fine or wrong then return refuse(fine and wrong or 'RATETHROTTLE a number of a part is out of range') end

-- Decides runs and leases, and then the parts.
function attempt(...)
  local partly, filled, entries, generations
  reply, partly, filled, entries, generations, decide_entry, work = decide(...)
  if reply.err then return reply end
  if entries + part_count > 128 then return refuse('RATETHROTTLE there are more than 128 entries') end
  codes, resets_at = {nil}, {nil}

  local function note(first, last)
    for i = first, last do
      if resets_at[i] then
        generations = generations or {nil}
        local size = #generations
        generations[size + 1], generations[size + 2] = entries + i, resets_at[i]
      end
    end
  end

  if consumes then
    partly, filled = decide_parts(partly, filled, note)
  else
    filled = look_parts(filled, note)
  end
  return reply, partly, filled, entries, generations
end
