-- claim, token, ttl, owner
if claim == ARGV[1] and token == ARGV[2] then
    if state ~= 'held' then
        return {'lost', ''}
    end
    write('until', whole(now + ARGV[3]))
elseif is_held or tonumber(token) >= tonumber(ARGV[2]) then
    return {'lost', is_held and owner or ''}
else
    -- The server has lost what it was told: whoever took the name since would have a greater token, or hold it.
    write('token', ARGV[2], 'claim', ARGV[1], 'state', 'held', 'until', whole(now + ARGV[3]), 'owner', ARGV[4],
        'before', '')
end
return {'extended'}
