--- Forgets what keys have used, in a way that nobody brings back.
--- KEYS: epoch_key state_key...
--- ARGV: request epoch keep_ms...
--- reply: request server_us generation...
-- Whatever a key holds is replaced, also what nobody can read. keep_ms: of each key, for how long somebody may know what it had used, or
-- have to charge what was admitted before; so long it is kept that it was reset. In another epoch than the one expected, the reply is
-- just -1 for the server's time, and nothing was done.
local KEYS, ARGV, refuse = KEYS, ARGV, redis.error_reply
local request, key_count = ARGV[1], #KEYS - 1
if not request or request == '' then return refuse('RATETHROTTLE no request id') end
if not (key_count >= 1 and key_count <= 128) then return refuse('RATETHROTTLE the count of keys is from 1 to 128') end
if #ARGV ~= 2 + key_count then return refuse('RATETHROTTLE the number of arguments is wrong') end
local seen = {}
for k = 1, #KEYS do
  if seen[KEYS[k]] then return refuse('RATETHROTTLE a key is given twice') end
  seen[KEYS[k]] = true
  if k > 1 and not number(ARGV[k + 1], 0, 9007199254740) then return refuse('RATETHROTTLE a time to keep is out of range') end
end
local reply = {request, now}
local entered = enter(states, ARGV[2])
if entered == nil then return {request, -1} end
if not entered then return refuse('RATETHROTTLE the epoch is malformed') end
views()

for k = 2, key_count + 1 do
  local key, head = KEYS[k], states[k] and match(states[k], '^[1]([^;]*;)')
  -- What is known of a key, by whomever, counts no longer than its state would have, or than the caller says.
  local keep_ms = max(ARGV[k + 1] + 0, call('PTTL', key), repair_us > 0 and floor((repair_us + 999) / 1000) + 1 or 0)
  local whole = {kind = 'f', window = max(keep_ms, 0) * 1000}
  local h = head and read_header('1' .. head, whole, nil) or read_header('1;', whole, nil)
  h.start, h.granted, h.bases, h.generation = now, 0, '', max(h.generation + 1, now)
  -- Whatever anybody knows is of before.
  if untold_us > 0 then h.told = 9007199254740991 end
  if keep_ms > 0 then
    local expiry_ms = format('%d', keep_ms)
    call('PSETEX', key, expiry_ms, print_header(h))
  else
    call('DEL', key)
  end
  reply[k + 1] = h.generation
end
return reply
