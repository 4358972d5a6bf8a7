--- Forgets what keys have used.
--- KEYS: state_key...
--- ARGV: request
--- reply: request
if not ARGV[1] or ARGV[1] == '' then return redis.error_reply('RATETHROTTLE no request id') end
if #KEYS == 0 then return redis.error_reply('RATETHROTTLE no keys') end
redis.call('DEL', unpack(KEYS))
return {ARGV[1]}
