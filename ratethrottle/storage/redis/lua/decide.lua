--- Decides items in order; each distinct key is read once and written at most once.
--- KEYS: epoch_key state_key...
--- ARGV: request mode epoch rule_count run_count lease_count rule... run... lease...
--- joint_ARGV: request mode epoch rule_count run_count lease_count part_count rule... run... lease... part...
--- rule: kind capacity window_us unit_ticks drain_ticks slot_us coarse_us lead_us
--- run: key_index key_count rule_index cost count
--- lease: key_index rule_index cost count ahead back back_us
--- part: key_index rule_index cost count bits
--- bits: joined=1 alternative=2 flagged=4 charge=8 refund=16 book=32 evenly=64 unbook=128
--- reply: request server_us answer... generation_pair...
--- joint_reply: request server_us answer... part_answer... generation_pair...
--- part_answer: took answer
--- answer_b: granted level
--- answer_s: granted total first_us reset_us retry_us
--- answer_c: granted cur prev since_us
--- answer_f: granted cur since_us
--- answer_d: granted cur since_us
--- generation_pair: item_number generation
--- unreadable: -2
--- unsure: -3
--- deferred: -4
--- skipped: -5
--- limits: keys=128 rules=128 items=128
-- A run is an item of `count` equal checks for each of `key_count` consecutive keys; a key's index counts state keys from 1. The
-- caller gives no key twice, or the last write would undo the others: to look for that takes as long as to read the rules. An answer
-- has no retry_us where all were granted, and to a lease one number more: ahead, the units taken ahead. Of items whose state was
-- reset, by number of the answer from 1, the reply tells when. The answer of an item whose state can't be read is `unreadable` alone;
-- nothing is written there, and the others are decided as ever. It is `unsure` alone where somebody may still tell of something that was
-- used before the epoch; nothing is granted then. So that a call doesn't hold the server for more than about a millisecond, items that
-- aren't simple are `deferred` once many were decided: nothing is done for them, and they have to be asked anew. In another epoch than the
-- one expected the reply is just -1 for the server's time, and nothing was read or done.
-- The modes check_joint and peek_joint have parts too, decided last. A part that isn't `joined` to the one before begins a joint check,
-- of which there are `count` equal ones. A part that isn't an `alternative` to the one before begins a set, whose parts pay in order. A
-- joint check is granted if each of its sets is; otherwise nothing of it is charged. A `flagged` part is a set that never vetoes. If all
-- of `count` are granted, a part answers as an item would, with `took` for `granted`; one that wasn't needed answers `skipped`. Otherwise,
-- and in a peek, it answers what one more check would hear. It has retry_us if nothing is granted, and a flagged one also if it took
-- fewer than `count`: 0 if one more would be granted. If a part can't be decided, nothing of its joint check is charged, and the other
-- parts answer `skipped`.
-- Parts that `charge` or `refund` stand among themselves. They count units that nobody was asked for, up to a debt of one capacity, with a
-- `count` of 1; and give units back, with the server's time of their grant for `count`. Each is taken (`took` 1), and answers as one check
-- that is granted, unless the key is in debt: then as one of no units that is denied until that is over.
-- A part that books, for a bucket, is a check by itself, which may be granted for later. Its `count` is that of equal ones, at most 10^6,
-- and 2^20 times how far ahead their turns may be, us, at most a minute. Then it is their turn: once the level, with them, is at the
-- capacity, or where they come `evenly` once all before them has drained. It answers as an item does, with `took` for `granted`. A part that
-- unbooks gives one of them back, unless others have booked behind it. Its `count` says when the bucket would have been empty after it.
-- kind d is a fixed window by a calendar. Its window_us is the mean length, slot_us the calendar's number, and unit_ticks drain_ticks
-- coarse_us lead_us are four boundaries around now, us: of the window before, this one, the next one and the one after it.

-- Decides runs and leases. Writes nothing. By place in KEYS: `states` as text, false if there is none; `ends`, the second in which what
-- was read ends, where that is known; `resets`, for what is to be written, how long it counts. Of some states only numbers change, to
-- numbers[k], behind places[k] bytes; the rest and the expiry stay. Returns the reply, without generations, whether there are such states,
-- how many numbers the reply holds, how many items were decided, the pairs of item and generation, if any, how that is decided which
-- isn't simple, and about how many us that took. Raises an error if a state is damaged in a way that is only met where it is read. As it
-- is called by pcall it is given all that it needs: to have that of the script itself costs as much as to decide an item.
local function decide(states, ends, resets, numbers, places, long_way, rules, consumes, repairing, untold_us, now, request, room, key_count,
    rule_count, run_count, lease_count, at, ARGV, number, refuse, format, match, sub, find, floor, min, max, unpack)
  local EXACT_MAX, UNITS_MAX, SUM_MAX, SECOND, WORK_MAX, DEFERRED = 9007199254740991, 4000000000, 512000000000, 1000000, 700, -4
  -- Where nils from `ends`, which is empty yet, make room, a table doesn't grow, for which all that it holds is counted.
  local reply, filled, items, partly = {request, now, unpack(ends, 1, room)}, 2, 0, false
  local decide_item, work, generations, reset_count = nil, 0, nil, 0
  for i = 1, run_count + lease_count do
    local key, last_key, rule, cost, count = number(ARGV[at + 1], 1, key_count), nil, nil, nil, nil
    local wanted, back, back_us
    if i > run_count then
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
    if items + last_key - key + 1 > 128 then return refuse('RATETHROTTLE there are more than 128 items') end
    rule = rules[rule]
    local kind, cap, alone, fresh, asked = rule.kind, rule.cap, rule.alone, rule.fresh, count * cost
    local simple, skip, window = consumes and not (wanted or repairing), #alone, rule.window
    local unit, drain, q, digits, modulus = rule.unit, rule.drain, rule.q, rule.digits, rule.modulus

    for k = key + 1, last_key + 1 do
      items = items + 1
      local state, done = states[k], false
      if partly and numbers[k] then
        state = sub(state, 1, places[k]) .. numbers[k] .. sub(state, places[k] + #numbers[k] + 1)
        states[k] = state
      end

      -- include simple.lua

      if not done then
        if work > WORK_MAX then
          filled = filled + 1
          reply[filled] = DEFERRED
        else
          local took, generation
          decide_item = decide_item or long_way(states, resets, numbers, reply, repairing, untold_us, now, sub, floor, min, max)
          filled, took, generation = decide_item(k, state, rule, cost, count, consumes, filled, wanted, back, back_us)
          work = work + took
          if generation then
            generations = generations or {nil}
            generations[reset_count + 1], generations[reset_count + 2], reset_count = items, generation, reset_count + 2
          end
        end
      end
    end
  end
  return reply, partly, filled, items, generations, decide_item, work
end

-- Nothing is written before everything is decided, so a refused call leaves every key as it is.
local KEYS, ARGV, refuse, SECOND = KEYS, ARGV, redis.error_reply, 1000000
local request, mode, key_count = ARGV[1], ARGV[2], #KEYS - 1
local rule_count, run_count, lease_count = number(ARGV[4], 1, 128), number(ARGV[5], 0, 128), number(ARGV[6], 0, 128)
local consumes, part_count, at = mode == 'check', 0, 6
if not request or request == '' then return refuse('RATETHROTTLE no request id') end
if not consumes and mode ~= 'peek' then
  if mode ~= 'check_joint' and mode ~= 'peek_joint' then return refuse('RATETHROTTLE mode is check or peek, alone or with _joint') end
  consumes, part_count, at = mode == 'check_joint', number(ARGV[7], 1, 128), 7
end
if not (rule_count and run_count and lease_count and part_count and run_count + lease_count + part_count >= 1) then
  return refuse('RATETHROTTLE the counts of rules and of items are from 1 to 128')
end
if not (key_count >= 1 and key_count <= 128) then return refuse('RATETHROTTLE the count of keys is from 1 to 128') end
local right = at + 8 * rule_count + 5 * (run_count + part_count) + 7 * lease_count
if #ARGV ~= right then return refuse('RATETHROTTLE the number of arguments is wrong') end
local rules, wrong = read_rules(at, rule_count)
if not rules then return refuse(wrong) end

local entered = enter(states, ARGV[3])
if entered == nil then return {request, -1} end
if not entered then return refuse('RATETHROTTLE the epoch is malformed') end
local ends, resets, numbers, places, attempt, check_parts = {nil}, {nil}, nil, nil, decide, nil
numbers, places = {unpack(ends, 1, key_count + 1)}, {unpack(ends, 1, key_count + 1)}
if part_count > 0 then
  -- include joint.lua
end
local room = 4 * key_count + part_count
at = at + 8 * rule_count
local fine, reply, partly, filled, _, generations = pcall(attempt, states, ends, resets, numbers, places, long_way, rules, consumes,
  repair_us > 0, untold_us, now, request, room, key_count, rule_count, run_count, lease_count, at, ARGV, number, refuse, format, match, sub,
  find, floor, min, max, unpack)
if not fine then
  local wrong = check_parts and check_parts()
  if wrong then return refuse(wrong) end
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
  reply, partly, filled, _, generations = attempt(states, ends, resets, numbers, places, long_way, rules, consumes, repair_us > 0, untold_us,
    now, request, room, key_count, rule_count, run_count, lease_count, at, ARGV, number, refuse, format, match, sub, find, floor, min, max,
    unpack)
end
if reply.err then return reply end
for i = 1, generations and #generations or 0 do reply[filled + i] = generations[i] end

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
