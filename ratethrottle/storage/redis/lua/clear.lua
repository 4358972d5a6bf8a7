--- Deletes the states that aren't of the present epoch.
--- KEYS: epoch_key state_key...
--- ARGV: request epoch
--- reply: request deleted
-- The caller has begun that epoch with a beat that clears. What was written since stays. In another epoch than the one expected, the
-- reply is just -1 for the count, and nothing was done.
local sub, call, KEYS, ARGV, refuse = string.sub, redis.call, KEYS, ARGV, redis.error_reply
local request, expected, count = ARGV[1], ARGV[2], 0
if not request or request == '' then return refuse('RATETHROTTLE no request id') end
if #ARGV ~= 2 or #expected ~= 72 then return refuse('RATETHROTTLE the epoch is malformed') end
if not (#KEYS >= 2 and #KEYS <= 501) then return refuse('RATETHROTTLE the count of keys is from 1 to 500') end
local states = call('MGET', unpack(KEYS))
if not states[1] or sub(states[1], 1, 72) ~= expected then return {request, -1} end
local mark = '1e' .. sub(expected, 41, 56)
for k = 2, #KEYS do
  -- What is no text is none of ours, or is damaged.
  if not states[k] or sub(states[k], 1, 18) ~= mark then count = count + call('DEL', KEYS[k]) end
end
return {request, count}
