"""The plots, as PNG and SVG, from figures in JSON: `python -m benchmarks.plots JSON DIR`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt  # the backend comes first
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.contenders import OURS
from benchmarks.timing import Figures

US, PEERS = "#c2185b", ("#546e7a", "#90a4ae", "#3f6ea6", "#8fb4dd", "#6d8f3a", "#b0c97f", "#8d6e63", "#b39ddb", "#d7ccc8")
SIZE = (8.0, 4.8)
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e0e0e0",
    "axes.axisbelow": True,
    "font.size": 10,
    "legend.frameon": False,
}


def short(name: str) -> str:
    """Name a limiter in a legend."""
    return name.replace(" (this project)", "")


def plain(axis: Axis) -> None:
    """Write the numbers of a logarithmic axis as people do, at 1, 2 and 5 of each power of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_locator(NullLocator())


def look(name: str, number: int) -> dict[str, Any]:
    """Draw ours on top, in a colour that nothing else has."""
    if name.startswith(OURS):
        dashes = "-" if "sliding" in name else "--"
        return {"color": US, "linewidth": 2.5, "linestyle": dashes, "marker": "o", "zorder": 5}
    return {"color": PEERS[number % len(PEERS)], "linewidth": 1.4, "marker": ".", "zorder": 3}


def throughput(results: Figures, axes: Axes) -> None:
    """Decisions/s by concurrency, over 20,000 keys."""  # the title of the plot
    by_name: dict[str, list[tuple[int, float]]] = {}
    for load, figures in results["peers"]["loads"].items():
        if load.endswith(" 20000 keys"):
            for name, each in figures.items():
                by_name.setdefault(name, []).append((int(load.split()[0]), each["decisions_per_s"]))
    for number, (name, points) in enumerate(by_name.items()):
        axes.plot(*zip(*points, strict=True), label=short(name), **look(name, number))
    axes.set(xscale="log", yscale="log", xlabel="tasks that check at once", ylabel="decisions per second")
    plain(axes.yaxis)
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = [tasks for tasks, _ in next(iter(by_name.values()))]
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def cpu(results: Figures, axes: Axes) -> None:
    """CPU of the client per decision, at 512 tasks over 20,000 keys."""  # the title of the plot
    figures = results["peers"]["loads"]["512 tasks, 20000 keys"]
    names = [name for name in figures if figures[name]["decisions"]][::-1]
    values = [figures[name]["client_us"] for name in names]
    bars = axes.barh([short(name) for name in names], values, color=[US if name.startswith(OURS) else PEERS[0] for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    if "redis" in results:
        wake_us = results["redis"]["by_tasks"]["wake"]["client_us"]
        axes.axvline(
            wake_us, color="black", linewidth=1, linestyle=":", label=f"waking a task through a bare future, {wake_us:.1f} µs"
        )
        axes.legend(fontsize=8, loc="upper right")
    axes.set(xscale="log", xlabel="µs of client CPU per decision")
    plain(axes.xaxis)
    axes.margins(x=0.15)


def script_calls(results: Figures, axes: Axes) -> None:
    """Script calls and items per decision by number of hot keys, 512 tasks."""  # the title of the plot
    figures = results["redis"]["by_hot_keys"]
    keys = [int(count) for count in figures]
    axes.plot(keys, [each["items"] for each in figures.values()], color=PEERS[2], marker=".", label="items")
    calls = [each["script_calls"] for each in figures.values()]
    axes.plot(keys, calls, color=US, marker="o", linewidth=2.5, label="script calls")
    axes.set(xscale="log", yscale="log", xlabel="keys that take the traffic", ylabel="per decision")
    plain(axes.yaxis)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(keys, [f"{count:,}" for count in keys])
    axes.legend()


def by_size(results: Figures, axes: Axes) -> None:
    """Time of a check in memory by number of keys."""  # the title of the plot
    figures = results["scale"]["by_size"]
    for name, label, look_ in (
        ("ns", "ratethrottle", {"color": US, "marker": "o", "linewidth": 2.5}),
        ("huge_pages_ns", "ratethrottle, huge pages", {"color": US, "marker": "o", "linestyle": "--"}),
    ):
        axes.plot([int(keys) for keys in figures[name]], list(figures[name].values()), label=label, **look_)
    axes.set(xscale="log", ylim=(0, None), xlabel="keys in the table", ylabel="ns per check of a random known key")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend()


def latency(results: Figures, axes: Axes) -> None:
    """Latency at 500 checks a second, p50 to p99.9."""  # the title of the plot
    shares = ("50", "90", "99", "99.9")
    for number, (name, each) in enumerate(results["peers"]["latency"].items()):
        if each["answered"]:
            axes.plot(
                [f"p{share}" for share in shares],
                [each[f"p{share}_ms"] for share in shares],
                label=short(name),
                **look(name, number),
            )
    axes.set(yscale="log", xlabel="share of the checks", ylabel="ms until the decision")
    plain(axes.yaxis)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


PLOTS: dict[str, tuple[str, Callable[[Figures, Axes], None]]] = {
    "throughput": ("peers", throughput),
    "cpu": ("peers", cpu),
    "script-calls": ("redis", script_calls),
    "cost-by-keys": ("scale", by_size),
    "latency": ("peers", latency),
}


def draw(results: Figures, directory: Path) -> Iterator[Path]:
    """Draw what the suites that ran have measured; the files, as they are written."""
    directory.mkdir(parents=True, exist_ok=True)
    machine = results["machine"]
    note = f"{machine['cpu']}, {machine['cores']} cores, {machine['python']}, {machine['date']}"
    with plt.rc_context(STYLE):
        for name, (suite, paint) in PLOTS.items():
            if suite not in results:
                continue
            figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
            paint(results, axes)
            axes.set_title((paint.__doc__ or "").strip().rstrip("."), loc="left", fontsize=11)
            figure.supxlabel(note, fontsize=7, color="#616161", x=0.01, ha="left")
            path = directory / f"{name}.png"
            figure.savefig(path, dpi=150)
            yield path
            plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m benchmarks.plots JSON DIR")
    for path in draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])):
        print(path)
