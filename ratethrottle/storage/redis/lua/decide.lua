--- Decides entries in order; each distinct key is read once and written at most once.
--- KEYS: epoch_key state_key...
--- ARGV: request mode epoch rule_count run_count lease_count rule... run... lease...
--- rule: kind capacity window_us unit_ticks drain_ticks slot_us coarse_us lead_us
--- run: key_index key_count rule_index cost count
--- lease: key_index rule_index cost count ahead back back_us
--- reply: request server_us answer... generation_pair...
--- answer_b: granted level
--- answer_s: granted total first_us reset_us retry_us
--- answer_c: granted cur prev since_us
--- answer_f: granted cur since_us
--- generation_pair: entry_number generation
--- unreadable: -2
--- unsure: -3
--- deferred: -4
--- limits: keys=128 rules=128 entries=128
-- A run is an entry of `count` equal checks for each of `key_count` consecutive keys; a key's index counts state keys from 1. The
-- caller gives no key twice, or the last write would undo the others: to look for that takes as long as to read the rules. An answer
-- has no retry_us where all were granted, and to a lease one number more: ahead, the units taken ahead. Of entries whose state was
-- reset, by number of the answer from 1, the reply tells when. The answer of an entry whose state can't be read is `unreadable` alone;
-- nothing is written there, and the others are decided as ever. It is `unsure` alone where somebody may still tell of something that was
-- used before the epoch; nothing is granted then. So that a call doesn't hold the server for more than about a millisecond, entries that
-- aren't simple are `deferred` once many were decided: nothing is done for them, and they have to be asked anew. In another epoch than the
-- one expected the reply is just -1 for the server's time, and nothing was read or done.

-- Makes what only entries need that aren't simple, and returns it.
local function others()
  local read, roll, read_header, print_header, print_state, units_of, at_of = views()
  local charge, give_back

  -- Counts units that were granted now, and others that were taken ahead.
  function charge(v, units, ahead)
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
  function give_back(v, lead, back, back_us)
    local kind, given = v.kind, 0
    if kind == 'b' then
      given = min(v.level, max(0, min(back, floor(TICKS / v.unit)) * v.unit - v.drain * max(0, now - back_us)))
      v.level = v.level - given
    elseif kind ~= 's' then
      if window_start(v.window, back_us) == v.start then
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

  return read, roll, read_header, print_header, print_state, units_of, at_of, charge, give_back
end

-- Decides all entries, and writes nothing. By place in KEYS: `states` as text, false if there is none; `ends`, the second in which what
-- was read ends, where that is known; `resets`, for what is to be written, how long it counts. Of some states only numbers change, to
-- numbers[k], behind places[k] bytes; the rest and the expiry stay. Returns the reply, and whether there are such states. Raises an
-- error if a state is damaged in a way that is only met where it is read. As it is called by pcall it is given all that it needs: to
-- have that of the script itself costs as much as to decide an entry.
local function decide(states, ends, resets, numbers, places, others, rules, consumes, repairing, untold_us, now, request, key_count, rule_count,
    run_count, lease_count, ARGV, number, refuse, format, match, sub, find, floor, min, max, unpack)
  local EXACT_MAX, UNITS_MAX, SUM_MAX, SECOND, WORK_MAX, PLAIN = 9007199254740991, 4000000000, 512000000000, 1000000, 700, '1;'
  local read, roll, read_header, print_header, print_state, units_of, at_of, charge, give_back
  -- About how many us the server was held for entries that aren't simple.
  local work = 0
  -- Where nils from `ends`, which is empty yet, make room, a table doesn't grow, for which all that it holds is counted.
  local reply, filled, entries, at = {request, now, unpack(ends, 1, 4 * key_count)}, 2, 0, 6 + 8 * rule_count
  -- Pairs of entry and generation.
  local partly, generations, reset_count = false, nil, 0
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
    if entries + last_key - key + 1 > 128 then return refuse('RATETHROTTLE there are more than 128 entries') end
    rule = rules[rule]
    local kind, cap, alone, fresh, asked = rule.kind, rule.cap, rule.alone, rule.fresh, count * cost
    local simple, skip, window = consumes and not (is_lease or repairing), #alone, rule.window
    local unit, drain, q, digits, modulus = rule.unit, rule.drain, rule.q, rule.digits, rule.modulus

    for k = key + 1, last_key + 1 do
      entries = entries + 1
      local state, done = states[k], false
      if partly and numbers[k] then
        state = sub(state, 1, places[k]) .. numbers[k] .. sub(state, places[k] + #numbers[k] + 1)
        states[k] = state
      end

      -- include simple.lua

      if not done then
        if not read then
          read, roll, read_header, print_header, print_state, units_of, at_of, charge, give_back = others()
        end
        local head, own, other, changed, derived, h, pushed, unsure = PLAIN, rule, nil, false, false, nil, 0, false
        local deferred = work > WORK_MAX
        if deferred then
          head = nil
        elseif state then
          head, own, other, changed, derived, pushed = read(state, rule)
        elseif kind == 'b' then
          rule.level, rule.t = 0, now
        elseif kind == 's' then
          rule.n, rule.total = 0, 0
        else
          rule.start, rule.cur, rule.prev = rule.began, 0, 0
        end
        if head and roll(own) then changed = true end
        if head and (repairing or head ~= PLAIN) then
          h = read_header(head, own, other)
          unsure = h and h.told < untold_us
          if h and h.generation > 0 and not unsure then
            generations = generations or {nil}
            generations[reset_count + 1], generations[reset_count + 2] = entries, h.generation
            reset_count = reset_count + 2
          end
          head = h and head
        end
        if not head or unsure then
          filled = filled + 1
          reply[filled] = deferred and -4 or head and -3 or -2
          work = work + 2
        else
          -- A view that was derived just now doesn't hold the lease's units as such, nor one that was reset since they were taken.
          if back > 0 and not derived and not (h and h.generation >= back_us) and give_back(own, rule.lead, back, back_us) then changed = true end

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
            -- A window that begins only after now, by this clock, counts as it will when it begins.
            local span, past, cur, prev = rule.span, max(0, now - own.start), own.cur, own.prev
            if cur > cap then cur = cap end
            if prev > cap then prev = cap end
            free = (cap - cur) * span - prev * (span - floor(past / rule.coarse))
            free = (free - free % span) / span
          end
          local granted, ahead, units = count, 0, asked
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
              if h then h.granted = min(h.granted + units + ahead, UNITS_MAX) end
              if other and other.kind == 'b' then
                -- A definition never owes more than its capacity for what another one admitted.
                other.level = min(other.level + min(units + ahead, other.cap) * other.unit, max(other.level, other.cap * other.unit))
              elseif other then
                charge(other, units, ahead)
              end
            end
            if changed then
              if h then head = print_header(h) end
              local reset, text = print_state(head, own, other)
              if h and h.keep > reset then reset = h.keep end
              work = work + (kind == 's' and own.n / 8 or 0) + (other and 1 + (other.kind == 's' and other.n / 4 or 0) or 0)
              states[k], resets[k], numbers[k] = reset > 0 and text, reset, nil
            end
          end

          work = work + 4 + 5 * (pushed or 0)
          reply[filled + 1] = granted
          if kind == 'b' then
            reply[filled + 2] = own.level
            filled = filled + 2
          elseif kind == 's' then
            local first, retry, reset = 0, nil, 0
            if granted < count then
              retry = -1
              if cost <= cap then
                -- When enough has left, from the oldest on.
                local excess, j = own.total + cost - cap, 0
                while excess > 0 do
                  excess = excess - units_of(own, j)
                  j = j + 1
                end
                work = work + j / 2
                retry = j > 0 and at_of(own, j - 1) + own.window - now or 0
                if not (retry >= 0) then error('the entries of a state do not ascend') end
              end
            end
            if own.n > 0 then first, reset = own.first + own.window - now, own.last + own.window - now end
            reply[filled + 2], reply[filled + 3], reply[filled + 4], filled = own.total, first, reset, filled + 4
            if retry then reply[filled + 1], filled = retry, filled + 1 end
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
    end
  end
  for i = 1, reset_count do reply[filled + i] = generations[i] end
  return reply, partly
end

-- Nothing is written before everything is decided, so a refused call leaves every key as it is.
local KEYS, ARGV, refuse, SECOND = KEYS, ARGV, redis.error_reply, 1000000
local request, mode, key_count = ARGV[1], ARGV[2], #KEYS - 1
local rule_count, run_count, lease_count = number(ARGV[4], 1, 128), number(ARGV[5], 0, 128), number(ARGV[6], 0, 128)
if not request or request == '' then return refuse('RATETHROTTLE no request id') end
if mode ~= 'check' and mode ~= 'peek' then return refuse('RATETHROTTLE mode is check or peek') end
if not (rule_count and run_count and lease_count and run_count + lease_count >= 1) then
  return refuse('RATETHROTTLE the counts of rules and of entries are from 1 to 128')
end
if not (key_count >= 1 and key_count <= 128) then return refuse('RATETHROTTLE the count of keys is from 1 to 128') end
local right = 6 + 8 * rule_count + 5 * run_count + 7 * lease_count
if #ARGV ~= right then return refuse('RATETHROTTLE the number of arguments is wrong') end
local rules, wrong = read_rules(6, rule_count)
if not rules then return refuse(wrong) end

local entered = enter(states, ARGV[3])
if entered == nil then return {request, -1} end
if not entered then return refuse('RATETHROTTLE the epoch is malformed') end
local ends, resets, numbers, places = {nil}, {nil}, nil, nil
numbers, places = {unpack(ends, 1, key_count + 1)}, {unpack(ends, 1, key_count + 1)}
local fine, reply, partly = pcall(decide, states, ends, resets, numbers, places, others, rules, mode == 'check', repair_us > 0, untold_us, now, request,
  key_count, rule_count, run_count, lease_count, ARGV, number, refuse, format, match, sub, find, floor, min, max, unpack)
if not fine then
  -- Now each state is looked at whole: are the entries of its sliding windows digits that ascend, and is the sum theirs?
  local read_again = call('MGET', unpack(KEYS))
  enter(read_again, ARGV[3])
  for k = 2, key_count + 1 do
    if states[k] ~= '' then states[k] = read_again[k] end
    for window, q, past, last, width, older in string.gmatch(states[k] or '', ';s(%d+),(%d+),%d+,(%d+),(%d+),(%d+),([^;]*)') do
      window, q, width = number(window, 1, 31622400000000), number(q, 1, 31622400000000), number(width, 1, 10)
      local v, held = window and q and width and not find(older, '[^0-9]') and sliding_view(window, q, 0), 0
      local before = v and v.modulus
      for at = 1, v and #older or 0, v and v.digits + width or 1 do
        local behind, units = (last - sub(older, at, at + v.digits - 1)) % v.modulus, sub(older, at + v.digits, at + v.digits + width - 1)
        if #units < width or behind >= before then break end
        before, held = behind, held + units
      end
      if not v or held ~= past + 0 or before == 0 then states[k] = '' end
    end
  end
  ends, resets, numbers, places = {nil}, {nil}, {nil}, {nil}
  reply, partly = decide(states, ends, resets, numbers, places, others, rules, mode == 'check', repair_us > 0, untold_us, now, request, key_count,
    rule_count, run_count, lease_count, ARGV, number, refuse, format, match, sub, find, floor, min, max, unpack)
end
if reply.err then return reply end

-- A key expires one to two seconds after it counts for the last time, at about a whole second: so that most checks leave that as it
-- is, and what is in use isn't deleted and made anew each time. repair.lua does it alike, or the expiry that is left would be another.
local expiry_ms, expiry_of = nil, nil
for k = 2, key_count + 1 do
  local reset = resets[k]
  if partly and numbers[k] then
    call('SETRANGE', KEYS[k], places[k], numbers[k])
  elseif reset == 0 then
    call('DEL', KEYS[k])
  elseif reset then
    local second = now + reset
    second = second - second % SECOND
    if ends[k] == second then
      -- To leave it as it is costs two thirds of setting it.
      call('SET', KEYS[k], states[k], 'KEEPTTL')
    else
      -- Most of a call's keys expire together.
      if second ~= expiry_of then expiry_of, expiry_ms = second, format('%d', floor((second + 2 * SECOND - now) / 1000)) end
      call('PSETEX', KEYS[k], expiry_ms, states[k])
    end
  end
end
return reply
