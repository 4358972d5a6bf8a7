-- The fast path of decide.lua, which includes it where it decides one key: for states that are simple, and that is most of them.
-- Simple: the state is the rule's own view alone, the clock has not stepped back, and a sliding window grants all that is asked or nothing.
-- It is a twin of read, roll, charge and print_state in state.lua, in one piece: without their tables and functions it takes two thirds
-- of the time. It decides, sets `done`, and leaves what is to be written in states, resets, ends, numbers and places; or changes nothing.
if simple and (not state or sub(state, 1, skip) == alone) then
  local text = state or fresh
  if kind == 'b' then
    local level, t = match(text, '^([0-9]+),([0-9]+);$', skip + 1)
    local past = t and now - t or -1
    level = past >= 0 and level + 0 or 0
    if past >= 0 and level <= EXACT_MAX then
      local granted, ending = count, state and t + level / drain
      level = level - drain * past
      if level < 0 then level = 0 end
      local free = cap * unit - level
      free = (free - free % unit) / unit
      if asked > free then granted = free > 0 and floor(free / cost) or 0 end
      if granted > 0 then
        level = level + granted * cost * unit
        local ticks, fields = level + drain - 1, format('%d,%d;', level, now)
        local reset = (ticks - ticks % drain) / drain
        if ending and not resets[k] then ends[k] = ending - ending % SECOND end
        local second = now + reset
        if ends[k] == second - second % SECOND and not resets[k] and #text == skip + #fields then
          partly, numbers[k], places[k] = true, fields, rule.place
        else
          states[k], resets[k], numbers[k] = alone .. fields, reset, nil
        end
      end
      reply[filled + 1], reply[filled + 2], filled, done = granted, level, filled + 2, true
    end
  elseif kind == 's' then
    local held, older, slot, width, from = match(text, '^([0-9]+),([0-9]+),([0-9]+),([0-9]+),()', skip + 1)
    local size, last, step = #text, from and slot * q - now, from and digits + width
    if from and find(text, ';', from, true) == size and (size - from) % step == 0 and last <= rule.ahead then
      local total, at, first = held + older, from, last
      if last + window <= 0 then
        total, at = 0, size
      else
        while at < size do
          first = last - (slot - sub(text, at, at + digits - 1)) % modulus * q
          if first + window > 0 then break end
          total, at, first = total - sub(text, at + digits, at + step - 1), at + step, last
        end
        -- Then its units are not what their sum says.
        if at > from and not (total >= held + 0) then total = SUM_MAX + 1 end
      end
      local before, granted, retry = total, count, nil
      total = total + asked
      if before > SUM_MAX then
        granted = 0
      elseif before + cost > cap then
        -- Denied until enough has left: counted from the oldest entry on.
        total, granted, retry, done = before, 0, -1, true
        if cost <= cap then
          local excess, leaves = before + cost - cap, at
          while excess > 0 and leaves < size do
            excess, leaves = excess - sub(text, leaves + digits, leaves + step - 1), leaves + step
          end
          retry = last + window
          if excess <= 0 then retry = retry - (slot - sub(text, leaves - step, leaves - step + digits - 1)) % modulus * q end
          done = retry > 0
        end
        if before == 0 then first, last = -window, -window end
      elseif total <= cap and before > 0 and (last > 0 or last == rule.slot - now) then
        local units = format('%d,', held + asked)
        if at == from and #units == #held + 1 and not resets[k] then
          -- Most checks change no more than this.
          partly, numbers[k], places[k], done = true, units, rule.place, true
        else
          local second = now + last + window
          if not resets[k] then ends[k] = second - second % SECOND end
          states[k] = alone .. units .. format('%d,%d,%d,', total - held - asked, slot, width) .. sub(text, at)
          resets[k], numbers[k], done = last + window, nil, true
        end
      elseif total <= cap and (before == 0 or #held <= width + 0) then
        last = rule.slot - now
        if before == 0 then
          first, states[k] = last, alone .. format('%d,0,%d,1,;', asked, rule.slot / q)
        else
          -- The newest entry becomes one of the older ones, which are printed alike if they have the same width.
          local shape = rule[width] or format('%%0%dd%%0%dd;', digits, width)
          rule[width] = shape
          states[k] = alone .. format('%d,%d,%d,%d,', asked, before, rule.slot / q, width) .. sub(text, at, size - 1)
            .. format(shape, slot % modulus, held)
        end
        resets[k], numbers[k], done = last + window, nil, true
      end
      if done then
        reply[filled + 1], reply[filled + 2], reply[filled + 3], reply[filled + 4] = granted, total, first + window, last + window
        filled = filled + 4
        if retry then reply[filled + 1], filled = retry, filled + 1 end
      end
    end
  else
    local shape = kind == 'f' and '^([0-9]+),([0-9]+);$' or '^([0-9]+),([0-9]+),([0-9]+);$'
    local start, cur, prev = match(text, shape, skip + 1)
    local began = rule.began
    start, cur, prev = start and start + 0, cur and cur + 0, prev and prev + 0 or 0
    if start and start <= began and cur <= UNITS_MAX and prev <= UNITS_MAX and (start == began or not rule.id and start == window_start(window, start)) then
      local granted, stays = count, cur > 0 and start == began and not resets[k]
      if start < began then
        prev = start == began - window and cur or 0
        cur = 0
      end
      local free = cap - cur
      if kind == 'c' then
        local span = rule.span
        free = free * span - min(prev, cap) * (span - floor((now - began) / rule.coarse))
        free = (free - free % span) / span
      end
      if asked > free then granted = free > 0 and floor(free / cost) or 0 end
      if granted > 0 then
        cur = cur + granted * cost
        local second, fields = began + window, nil
        if kind == 'f' then
          fields = format('%d,%d;', began, cur)
        else
          second, fields = second + window, format('%d,%d,%d;', began, cur, prev)
        end
        if stays and #text <= skip + #fields then
          -- A count grows, so that nothing is left behind it.
          partly, numbers[k], places[k] = true, fields, rule.place
        else
          states[k], resets[k], numbers[k] = alone .. fields, second - now, nil
        end
      end
      reply[filled + 1], reply[filled + 2], done = granted, cur, true
      if kind == 'f' then
        reply[filled + 3], filled = now - began, filled + 3
      else
        reply[filled + 3], reply[filled + 4], filled = prev, now - began, filled + 4
      end
    end
  end
end
