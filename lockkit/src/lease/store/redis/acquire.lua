-- claim, ttl, owner, and the claim and token of the holder that counts as run out
if claim == ARGV[1] and (state == 'released' or state == 'lost') then
    -- A request that was overtaken by the end of its own grant, but for an eviction.
    return {'over'}
end
local before = record[6] or ''
if claim ~= ARGV[1] or state ~= 'held' then
    if is_held and not (claim == ARGV[4] and token == ARGV[5]) then
        return {'busy', token, claim, whole(left), owner}
    end
    before = ''
    if claim and state ~= 'released' and state ~= 'evicted' then
        -- Never empty, so that an owner who is not known is told of, too.
        before = ' ' .. owner
    end
    token = whole(math.max(tonumber(token) + 1, now))
end
write('token', token, 'claim', ARGV[1], 'state', 'held', 'until', whole(now + ARGV[2]), 'owner', ARGV[3],
    'before', before)
return {'granted', token, before}
