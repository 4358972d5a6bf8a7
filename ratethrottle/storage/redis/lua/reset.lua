--- Forgets what keys have used.
--- KEYS: state keys
--- ARGV: request
--- reply: request
redis.call('DEL', unpack(KEYS))
return {ARGV[1]}
