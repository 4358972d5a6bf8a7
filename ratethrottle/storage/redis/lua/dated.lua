-- Makes a rule whose windows are those of a calendar, in `read_rules`, which includes this. Few calls have one, and each function costs every
-- call that makes it. In place of numbers that such a rule doesn't have stand the calendar's number and four boundaries.
span_of = span_of or function(edges, length, instant)
  -- Outside of the boundaries that are known, windows have the mean length.
  if instant < edges[1] or instant >= edges[4] then
    local since = instant - (instant - edges[instant < edges[1] and 1 or 4]) % length
    return since, since + length
  end
  local i = instant < edges[2] and 2 or instant < edges[3] and 3 or 4
  return edges[i - 1], edges[i]
end
local id, first, since = number(q, 1, TICKS), number(unit, 0, TICKS), number(drain, 0, TICKS)
local ends, last = number(coarse, 0, TICKS), number(lead, 0, TICKS)
if id and first and since and ends and last and first < since and since < ends and ends < last then
  local edges = {first, since, ends, last}
  since, ends = span_of(edges, window, now)
  rule = {kind = 'f', cap = cap, window = window, name = format('d%d,%d,', id, window), start = 0, cur = 0, prev = 0, id = id, edges = edges,
    since = since, ends = ends, began = ends - window}
end
