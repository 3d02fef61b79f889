"""Figures from rows, each a matplotlib figure or, where there are no rows for it, nothing."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from .roofline import NAME as EXPONENTIALS
from .rows import Row
from .tables import comparisons, is_batch

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "benchmarks",
    "font.size": 9,
    "axes.spines.top": False,
}
_SETTINGS |= {"axes.spines.right": False, "font.family": "DejaVu Sans"}


def _ok(rows: Iterable[Row], suite: str) -> list[Row]:
    return [row for row in rows if row["suite"] == suite and row["status"] == "ok"]


def _axes(count: int = 1) -> tuple[Figure, Any]:
    """Panels one below the other: legible on narrow screens too."""
    figure, axes = pyplot.subplots(count, 1, figsize=(5.6, 0.4 + 2.8 * count), layout="constrained", squeeze=False)
    return figure, axes[:, 0]


_OURS = ("cuda", "triton", "cpu", "torch")
_OTHERS = ("eager", "eager-fp32-softmax", "chunked", "torch.compile", "sdpa", "flex", "bertdistiller", "liger-kernel")
_COLOURS = ["C2", "C4", "C0", "C1", "C7", "0.75", "C8", "C5", "C3", "C6", "C9", "gold"]


def _colour(name: str) -> str:
    return dict(zip((*_OURS, *_OTHERS), _COLOURS, strict=True)).get(name, "black")


def _style(name: str) -> dict[str, Any]:
    """Every provider has its colour in all figures; ours are full lines."""
    look = ("-", "o") if name in _OURS else ("--", "s")
    return {"color": _colour(name), "linestyle": look[0], "marker": look[1], "markersize": 4}


def _lines(axes: Any, rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float]) -> bool:
    """A line a provider; False where no provider has two points."""
    drawn = False
    for name in dict.fromkeys(row["provider"] for row in rows):
        points = sorted({(x(row), y(row)) for row in rows if row["provider"] == name})
        if len({point[0] for point in points}) > 1:
            axes.plot(*zip(*points, strict=True), label=name, **_style(name))
            drawn = True
    return drawn


def _usual(rows: Sequence[Row]) -> list[Row]:
    """Of one device, dtype, heads, relations, unmasked: the combination with most rows."""

    def key(row: Row) -> tuple:
        shape = row["shape"]
        return (
            row["device"],
            row["dtype"],
            row["mode"],
            shape["A"],
            shape["d_t"],
            shape["d_s"],
            shape["relations"],
            shape["mask"],
        )

    def heads(row: Row) -> tuple:  # A may vary to keep the number of pairs
        return tuple(value for i, value in enumerate(key(row)) if i != 3)

    plain = [row for row in rows if row["shape"]["mask"] == "none" and row["mode"] == "full"]
    counts: dict[tuple, int] = {}
    for row in plain:
        counts[heads(row)] = counts.get(heads(row), 0) + 1
    best = max(counts, key=lambda k: counts[k], default=None)
    return [row for row in plain if heads(row) == best]


def time(rows: Sequence[Row]) -> Figure | None:
    """Nanoseconds a pair against S, and milliseconds against B at the S that has most batches, each of one run."""
    ok = [row for row in _ok(rows, "loss") if row["method"] != "graph" and row["provider"] != EXPONENTIALS]
    lengths = _usual(_most_common(ok, lambda row: row["run"], lambda row: row["shape"]["S"]))
    batches = _usual(_most_common(ok, lambda row: (row["run"], row["shape"]["S"]), lambda row: row["shape"]["B"]))
    panels = []
    if len({row["shape"]["S"] for row in lengths}) > 1:
        panels.append(("S", "ns a pair", lengths, lambda row: 1e6 * row["median_ms"] / row["pairs"]))
    if len({row["shape"]["B"] for row in batches}) > 1:
        panels.append(("B", "ms", batches, lambda row: row["median_ms"]))
    return _panels(panels, "Loss and gradient")


def _most_common(rows: Sequence[Row], group: Callable[[Row], Any], value: Callable[[Row], Any]) -> list[Row]:
    found: dict[Any, set] = {}
    for row in rows:
        found.setdefault(group(row), set()).add(value(row))
    best = max(found, key=lambda k: len(found[k]), default=None)
    return [row for row in rows if group(row) == best]


def _size(name: str, row: Row) -> int:
    return row["shape"][name]


def _panels(panels: Sequence[tuple], title: str) -> Figure | None:
    if not panels:
        return None
    figure, all_axes = _axes(len(panels))
    drawn = False
    for axes, (size, label, found, value) in zip(all_axes, panels, strict=True):
        drawn |= _lines(axes, found, partial(_size, size), value)
        shape = found[0]["shape"]
        other = f"S = {shape['S']}" if size == "B" else ""
        axes.set(xscale="log", yscale="log", xlabel=size + (f" ({other})" if other else ""), ylabel=label)
        sizes = sorted({row["shape"][size] for row in found})
        axes.set_xticks(sizes, [str(s) for s in sizes])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        if high < 10 * low:  # a logarithmic axis would have no number
            axes.set_yscale("linear")
            axes.set_ylim(0, high)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}, {panels[0][2][0]['dtype']}, {panels[0][2][0]['device']}", fontsize=9)
    if not drawn:
        pyplot.close(figure)
        return None
    return figure


def memory(rows: Sequence[Row]) -> Figure | None:
    """Peak MiB against S and against B."""
    found = _usual([row for row in _ok(rows, "memory") if not is_batch(row)])
    by_length = _most_common(found, lambda row: (row["shape"]["B"], row["shape"]["A"]), lambda row: row["shape"]["S"])
    by_batch = _most_common(found, lambda row: (row["shape"]["S"], row["shape"]["A"]), lambda row: row["shape"]["B"])
    panels = []
    for size, chosen in (("S", by_length), ("B", by_batch)):
        if len({row["shape"][size] for row in chosen}) > 1:
            panels.append((size, "peak, MiB", chosen, lambda row: row["peak_bytes"] / 2**20))
    return _panels(panels, "Memory of loss and gradient")


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Measured time over the time that the exponentials alone take, a group of bars a workload."""
    groups = []
    for members in comparisons(rows):
        bound = next((row for row in members if row["provider"] == EXPONENTIALS), None)
        if bound is not None and members[0]["mode"] == "full":
            ok = [row for row in members if row["status"] == "ok" and row is not bound]
            groups.append((bound, sorted(ok, key=lambda row: row["median_ms"])))
    groups = [(bound, found) for bound, found in groups if found][:3]
    if not groups:
        return None
    figure, all_axes = _axes(len(groups))
    for axes, (bound, found) in zip(all_axes, groups, strict=True):
        ratios = [row["median_ms"] / bound["median_ms"] for row in found]
        bars = axes.barh([row["provider"] for row in found], ratios, color=[_colour(row["provider"]) for row in found])
        axes.bar_label(bars, [f"{ratio:.2g}" for ratio in ratios], padding=2, fontsize=8)
        axes.set(
            xscale="log",
            xlim=(0.5 * min(1.0, *ratios), 4 * max(ratios)),
            xlabel="time / time of the exponentials alone",
        )
        axes.axvline(1, color="0.3", linewidth=0.8)
        shape = bound["shape"]
        title = f"B {shape['B']}, A {shape['A']}, S {shape['S']}, {shape['d_t']}/{shape['d_s']}, {shape['relations']}"
        axes.set_title(title, fontsize=8)
        axes.invert_yaxis()
    figure.suptitle(f"Loss and gradient, {groups[0][0]['dtype']}, {groups[0][0]['device']}", fontsize=9)
    return figure


def accuracy(rows: Sequence[Row]) -> Figure | None:
    """Relative error of the scalar against the divergence."""
    found = [row for row in _ok(rows, "accuracy") if row["detail"].get("reduction") == "sequence"]
    if not found:
        return None
    figure, (axes,) = _axes()
    drawn = _lines(axes, found, lambda row: row["detail"]["kl"], lambda row: max(row["error_value"], 1e-9))
    axes.set(xscale="log", yscale="log", xlabel="KL, nats", ylabel="relative error of the loss")
    axes.axhline(1e-3, color="0.3", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"float32 against float64, {found[0]['device']}", fontsize=9)
    return figure if drawn else None


def batch(rows: Sequence[Row]) -> Figure | None:
    """The largest batch that fits, a bar a provider."""
    found = [row for row in _ok(rows, "memory") if is_batch(row)]
    first = [row for row in found if {**row["shape"], "B": 0} == {**found[0]["shape"], "B": 0}]
    first = [row for row in first if row["dtype"] == first[0]["dtype"] and row["device"] == first[0]["device"]]
    if not first:
        return None
    figure, (axes,) = _axes()
    largest = [row["shape"]["B"] for row in first]
    bars = axes.barh([row["provider"] for row in first], largest, color=[_colour(row["provider"]) for row in first])
    axes.bar_label(bars, [str(B) for B in largest], padding=2, fontsize=8)
    shape, budget = first[0]["shape"], first[0]["detail"]["budget_bytes"] / 2**30
    what = f"A {shape['A']}, S {shape['S']}, {shape['relations']}, {first[0]['dtype']}"
    axes.set(xlabel=f"largest B in {budget:g} GiB ({what})")
    axes.set_xlim(0, 1.15 * max(*largest, 1))
    axes.invert_yaxis()
    axes.set_title(first[0]["device"], fontsize=9)
    return figure


FIGURES: dict[str, tuple[Callable[[Sequence[Row]], Figure | None], str]] = {
    "time": (time, "time of loss and gradient against sequence length and batch"),
    "roofline": (roofline, "time over the time of the exponentials alone"),
    "memory": (memory, "peak memory against sequence length and batch"),
    "batch": (batch, "largest batch that fits"),
    "accuracy": (accuracy, "relative error of the loss against the divergence"),
}


def draw(name: str, rows: Sequence[Row]) -> Figure | None:
    with matplotlib.rc_context(_SETTINGS):
        return FIGURES[name][0](rows)


def svg(figure: Figure) -> str:
    """The figure as an SVG element to stand inside a page; equal rows give equal text."""
    out = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


def png(figure: Figure, file: Path) -> None:
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(file, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
