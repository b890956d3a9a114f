-- claim, token, the state to leave it in, whether it is the holder who asks, and who is to count as holder then
local is_its = claim == ARGV[1] and token == ARGV[2]
if is_its and state ~= 'held' then
    -- This very request may have done it before.
    return state == ARGV[3] and {'done'} or {'not mine'}
end
if not is_its and (ARGV[4] == '' or is_held or tonumber(token) >= tonumber(ARGV[2])) then
    return {'not mine'}
end
-- Also where the server has lost what it was told: the next token is greater all the same.
write('token', ARGV[2], 'claim', ARGV[1], 'state', ARGV[3])
if ARGV[5] then
    write('owner', ARGV[5])
end
if record[7] then
    redis.call('HDEL', KEYS[1], 'awaited')
    redis.call('PUBLISH', KEYS[1], '')
end
return {'done'}
