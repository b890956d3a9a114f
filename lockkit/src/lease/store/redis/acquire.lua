-- Arguments: the claim, the TTL, the owner, and the claim and the token of a holder that counts as expired.
if claim == ARGV[1] and (state == 'released' or state == 'lost') then
    -- The request arrives after the end of its own grant. After an eviction the claim may acquire again.
    return {'over'}
end
local before = record[6] or ''
if claim ~= ARGV[1] or state ~= 'held' then
    if is_held and not (claim == ARGV[4] and token == ARGV[5]) then
        return {'busy', token, claim, whole(left), owner}
    end
    before = ''
    if claim and state ~= 'released' and state ~= 'evicted' then
        -- Never empty, so that the grant also reports the death of an unknown owner.
        before = ' ' .. owner
    end
    token = whole(math.max(tonumber(token) + 1, now))
end
write('token', token, 'claim', ARGV[1], 'state', 'held', 'until', whole(now + ARGV[2]), 'owner', ARGV[3],
    'before', before)
return {'granted', token, before}
