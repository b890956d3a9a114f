-- The beginning of every script: the server's time, and the content of the record. A double represents whole numbers of
-- microseconds exactly.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local record = redis.call('HMGET', KEYS[1], 'token', 'claim', 'state', 'until', 'owner', 'before', 'awaited')
local token, claim, state, owner = record[1] or '0', record[2], record[3], record[5] or ''
local left = tonumber(record[4] or '0') - now
local is_held = state == 'held' and left > 0

local function whole(number)
    return string.format('%.0f', number)
end

local function write(...)
    redis.call('HSET', KEYS[1], ...)
end

