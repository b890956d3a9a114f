-- Argument: whether to leave the mark of a waiter.
if not is_held then
    return {'free'}
end
if ARGV[1] ~= '' and not record[7] then
    write('awaited', '1')
end
return {'held', token, claim, whole(left), owner}
