-- Arguments: the claim, the token, the TTL, the owner.
if claim == ARGV[1] and token == ARGV[2] then
    if state ~= 'held' then
        return {'lost', ''}
    end
    write('until', whole(now + ARGV[3]))
elseif is_held or tonumber(token) >= tonumber(ARGV[2]) then
    return {'lost', is_held and owner or ''}
else
    -- The server has lost the grant. A later holder of the name would have a greater token, or would hold the name.
    write('token', ARGV[2], 'claim', ARGV[1], 'state', 'held', 'until', whole(now + ARGV[3]), 'owner', ARGV[4],
        'before', '')
end
return {'extended'}
