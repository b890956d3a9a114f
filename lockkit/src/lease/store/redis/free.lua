-- Arguments: the claim, the token, the state in which the grant ends, whether the caller is the holder, and the owner
-- to record as the holder, if another.
local is_its = claim == ARGV[1] and token == ARGV[2]
if is_its and state ~= 'held' then
    -- An earlier attempt of this request may have ended the grant.
    return state == ARGV[3] and {'done'} or {'not mine'}
end
if not is_its and (ARGV[4] == '' or is_held or tonumber(token) >= tonumber(ARGV[2])) then
    return {'not mine'}
end
-- Also if the server has lost the grant, because the next token must be greater.
write('token', ARGV[2], 'claim', ARGV[1], 'state', ARGV[3])
if ARGV[5] then
    write('owner', ARGV[5])
end
if record[7] then
    redis.call('HDEL', KEYS[1], 'awaited')
    redis.call('PUBLISH', KEYS[1], '')
end
return {'done'}
