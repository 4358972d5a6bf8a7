"""What the demo draws: the servers above their Redis with live counts on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Sequence

from ratethrottle.cli.processes import Server

GAP = 5
BAR = 40
PLAIN_EVERY_S = 0.5
# For a terminal whose encoding has no such characters.
ASCII = str.maketrans("┌┐└┘┬┴┼─│▼█░", "+++++++-|v#.")


class Screen:
    """Draws the counts: the picture over and over in place, or one live line if that doesn't fit, or a line now and then."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = 0
        self._told = ""
        self._told_s = 0.0

    def draw(self, servers: Sequence[Server], *, last: bool = False) -> None:
        """Show how things stand."""
        if not self._terminal:
            now_s, text = asyncio.get_running_loop().time(), summary(servers)
            if text != self._told and (last or now_s - self._told_s >= PLAIN_EVERY_S):
                self._told, self._told_s = text, now_s
                say(text)
            return
        lines = picture(servers, self._limit)
        columns = shutil.get_terminal_size().columns
        if max(map(len, lines)) >= columns:  # a line that wraps would leave its rest behind
            lines = [summary(servers)[: columns - 1]]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        self._drawn = len(lines)
        say(up + "\n".join(f"\x1b[K{line}" for line in lines))


def say(text: str) -> None:
    """Print at once, in the characters that the terminal has."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = text.translate(ASCII).encode("ascii", "replace").decode()
    print(text, flush=True)


def summary(servers: Sequence[Server]) -> str:
    """Say in one line what was admitted, in total (first: a narrow terminal cuts the rest) and by each server of what it was offered."""
    counts = "  ".join(f"{one.name}: {one.admitted} of {one.offered}" for one in servers)
    return f"together: {sum(one.admitted for one in servers)}  {counts}"


def picture(servers: Sequence[Server], limit: int) -> list[str]:
    """Draw the architecture of the page with the counts in it, as lines."""
    inner = max(13, len(f" {limit} admitted ") | 1)
    columns = [i * (inner + 2 + GAP) + inner // 2 + 1 for i in range(len(servers))]
    centre = (columns[0] + columns[-1]) // 2
    total = sum(one.admitted for one in servers)
    used = round(BAR * min(total, limit) / limit)

    def row(left: str, texts: Sequence[str], right: str) -> str:
        return (" " * GAP).join(f"{left}{text}{right}" for text in texts)

    edge = "─" * (inner // 2)
    return [
        row("┌", ["─" * inner] * len(servers), "┐"),
        row("│", [one.name.capitalize().center(inner) for one in servers], "│"),
        row("│", [f"{one.admitted} admitted".center(inner) for one in servers], "│"),
        row("│", [f"of {one.offered}".center(inner) for one in servers], "│"),
        row("└", [f"{edge}┬{edge}"] * len(servers), "┘"),
        rail(columns, centre),
        " " * centre + "▼",
        f"Redis: {total} of {limit} used".center(2 * centre + 1).rstrip(),
        f"{'█' * used}{'░' * (BAR - used)}".center(2 * centre + 1).rstrip(),
    ]


def rail(columns: Sequence[int], centre: int) -> str:
    """Draw the line that joins the servers' columns and leaves them in the middle."""
    if len(columns) == 1:
        return " " * centre + "│"
    line = [" "] * columns[0] + ["─"] * (columns[-1] - columns[0] + 1)
    for column in columns[1:-1]:
        line[column] = "┴"
    line[columns[0]], line[columns[-1]] = "└", "┘"
    line[centre] = "┼" if centre in columns else "┬"
    return "".join(line)


def table(rows: Sequence[tuple[str, int, int]]) -> str:
    """Lay out what each offered, admitted and denied, with the totals below."""
    rows = [*rows, ("together", sum(row[1] for row in rows), sum(row[2] for row in rows))]
    lines = [f"{'':14}{'offered':>10}{'admitted':>10}{'denied':>10}"]
    lines += [f"{name:14}{offered:>10,}{admitted:>10,}{offered - admitted:>10,}" for name, offered, admitted in rows]
    return "\n".join(lines)
