"""The figures. Each function returns a matplotlib figure, or None if it has no records."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks.measure.records import Record
from benchmarks.roofline import NAME as EXPONENTIALS

from . import tables
from .tables import Records, fill, groups

_SETTINGS: dict[Any, Any] = {
    **{"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.size": 9, "font.family": "DejaVu Sans"},
    **{"axes.spines.top": False, "axes.spines.right": False},
}
# Each provider has the same color in every figure. The backends of this package have solid lines.
_OURS = {"cuda": "C2", "triton": "C4", "cpu": "C0", "torch": "C1"}
_COLOURS = _OURS | {
    **{"eager": "C7", "eager-fp32-softmax": "0.75", "chunked": "C8", "torch.compile": "C5", "sdpa": "C3"},
    **{"flex": "C6", "bertdistiller": "C9", "liger-kernel": "gold"},
}


def _colour(record: Record) -> str:
    return _COLOURS.get(record["provider"], "black")


def _ok(records: Records) -> list[Record]:
    return [r for r in records if r["status"] == "ok"]


def _axes(count: int = 1) -> tuple[Figure, Any]:
    """Panels below one another, so that they are legible on narrow screens."""
    figure, axes = pyplot.subplots(count, 1, figsize=(5.6, 0.4 + 2.8 * count), layout="constrained", squeeze=False)
    return figure, axes[:, 0]


def _lines(axes: Any, records: Records, x: Callable[[Record], float], y: Callable[[Record], float]) -> bool:
    """Draw one line per provider. Return False if no provider has two points."""
    drawn = False
    for name, own in groups(records, lambda r: r["provider"]):
        points = sorted({(x(r), y(r)) for r in own})
        if len({point[0] for point in points}) > 1:
            style = {"linestyle": "-", "marker": "o"} if name in _OURS else {"linestyle": "--", "marker": "s"}
            axes.plot(*zip(*points, strict=True), label=name, color=_colour(own[0]), markersize=4, **style)
            drawn = True
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    return drawn


def _most(records: Records, group: Callable[[Record], Any], value: Callable[[Record], Any] = id) -> list[Record]:
    """The records of the group with the most different values."""
    found = groups(records, group)
    return max((own for _, own in found), key=lambda own: len(set(map(value, own))), default=[])


def _comparable(records: Records) -> list[Record]:
    """Unmasked records of one device, dtype, widths and relations; A may vary to keep the number of pairs."""
    plain = [r for r in _ok(records) if r["shape"]["mask"] == "none" and r["mode"] == "full"]
    return _most(plain, lambda r: (r["device"], r["dtype"], *(r["shape"][n] for n in ("d_t", "d_s", "relations"))))


def _size(name: str, record: Record) -> int:
    return record["shape"][name]


def time(records: Records) -> Figure | None:
    """ns/pair against S, and milliseconds against B at the S that has most batches, each within one run."""
    found = [r for r in tables.providers(tables.suite("loss", records)) if r["method"] != "graph"]
    by_length = _comparable(_most(_ok(found), lambda r: r["run"], partial(_size, "S")))
    by_batch = _comparable(_most(_ok(found), lambda r: (r["run"], _size("S", r)), partial(_size, "B")))
    return _panels(
        "Loss and gradient",
        ("S", "ns/pair", by_length, lambda r: 1e6 * r["median_ms"] / r["pairs"]),
        ("B", "ms", by_batch, lambda r: r["median_ms"]),
    )


def memory(records: Records) -> Figure | None:
    """Peak memory in MiB against S and against B."""
    found = _comparable(tables.peaks(records))
    by_length = _most(found, lambda r: (_size("B", r), _size("A", r)), partial(_size, "S"))
    by_batch = _most(found, lambda r: (_size("S", r), _size("A", r)), partial(_size, "B"))

    def mib(r: Record) -> float:
        return r["peak_bytes"] / 2**20

    title = "Peak memory of loss and gradient"
    return _panels(title, ("S", "peak, MiB", by_length, mib), ("B", "peak, MiB", by_batch, mib))


def _panels(title: str, *panels: tuple[str, str, Records, Callable[[Record], float]]) -> Figure | None:
    """Panels of lines against S or B. Panels with a single size are left out."""
    kept = [panel for panel in panels if len({_size(panel[0], r) for r in panel[2]}) > 1]
    if not kept:
        return None
    figure, all_axes = _axes(len(kept))
    for axes, (size, label, found, value) in zip(all_axes, kept, strict=True):
        _lines(axes, found, partial(_size, size), value)
        fixed = f" (S = {_size('S', found[0])})" if size == "B" else ""
        axes.set(xlabel=size + fixed, ylabel=label)
        sizes = sorted({_size(size, r) for r in found})
        axes.set_xticks(sizes, [str(s) for s in sizes])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        low, high = axes.get_ylim()
        if high < 10 * low:  # a logarithmic axis would have no labels
            axes.set(yscale="linear", ylim=(0, high))
    all_axes[0].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{title}, {kept[0][2][0]['dtype']}, {kept[0][2][0]['device']}", fontsize=9)
    return figure


def roofline(records: Records) -> Figure | None:
    """Measured time relative to the exponentials alone, with one point per provider and one panel per workload."""
    panels = []
    for group in tables.comparisons(records):
        yardsticks = [r for r in group if r["provider"] == EXPONENTIALS]
        found = sorted(_ok(tables.providers(group)), key=lambda r: -r["median_ms"])
        if yardsticks and found and group[0]["mode"] == "full":
            panels.append((yardsticks[0], found))
    if not panels:
        return None
    panels = panels[:3]
    figure, all_axes = _axes(len(panels))
    for axes, (yardstick, found) in zip(all_axes, panels, strict=True):
        ratios = [r["median_ms"] / yardstick["median_ms"] for r in found]
        axes.scatter(ratios, range(len(found)), color=[_colour(r) for r in found], zorder=2)
        for place, ratio in enumerate(ratios):
            label = {"textcoords": "offset points", "va": "center", "fontsize": 8, "backgroundcolor": "white"}
            axes.annotate(f"{ratio:.2g}", (ratio, place), (8, 0), **label)
        axes.set(xscale="log", xlim=(min(0.1, 0.5 * min(ratios)), max(100, 2 * max(ratios))))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(ylim=(-0.6, len(found) - 0.4), yticks=range(len(found)), yticklabels=[r["provider"] for r in found])
        axes.axvline(1, color="0.3", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.set_title(fill("B {B}, A {A}, S {S}, {d_t}/{d_s}, {relations}", yardstick["shape"]), fontsize=8)
    instruction = "torch.exp" if "," in panels[0][0]["device"] else "ex2"
    all_axes[-1].set_xlabel(f"time / time of two exponentials a pair by {instruction}")
    figure.suptitle(f"Loss and gradient, {panels[0][0]['dtype']}, {panels[0][0]['device']}", fontsize=9)
    return figure


def accuracy(records: Records) -> Figure | None:
    """Relative error of the loss against the divergence."""
    found = [r for r in _ok(tables.small_divergences(records)) if r["detail"]["reduction"] == "sequence"]
    if not found:
        return None
    figure, (axes,) = _axes()
    _lines(axes, found, lambda r: r["detail"]["kl"], lambda r: max(r["error_value"], 1e-9))
    axes.set(xlabel="KL, nats", ylabel="relative error of the loss")
    axes.axhline(1e-3, color="0.3", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"float32 against float64, {found[0]['device']}", fontsize=9)
    return figure


def batch(records: Records) -> Figure | None:
    """The largest batch that fits, with one bar per provider."""
    found = _ok(tables.largest_batches(records))
    if not found:
        return None
    _, found = groups(found, lambda r: (r["device"], r["dtype"], {**r["shape"], "B": None}))[0]
    figure, (axes,) = _axes()
    largest = [_size("B", r) for r in found]
    bars = axes.barh([r["provider"] for r in found], largest, color=[_colour(r) for r in found])
    axes.bar_label(bars, [str(B) for B in largest], padding=2, fontsize=8)
    label = "largest B in {budget:g} GiB (A {A}, S {S}, {relations}, {dtype})"
    axes.set(xlabel=fill(label, tables.fields(found[0])), xlim=(0, 1.15 * max(*largest, 1)))
    axes.invert_yaxis()
    axes.set_title(found[0]["device"], fontsize=9)
    return figure


def train_step(records: Records) -> Figure | None:
    """Valid tokens per second of the largest batch against S, with one line or point per layout."""
    found = _ok(tables.suite("train_step", records))
    found = _most(found, lambda r: (r["run"], r["dtype"], r["provider"], r["detail"]["model"]), partial(_size, "S"))
    if len({_size("S", r) for r in found}) < 2:
        return None
    figure, (axes,) = _axes()
    for layout, own in groups(found, lambda r: r["detail"]["layout"]):
        largest = {_size("S", r): r for r in sorted(own, key=partial(_size, "B"))}
        points = [(S, largest[S]["detail"]["tokens_per_s"]) for S in sorted(largest)]
        axes.plot(*zip(*points, strict=True), label=layout, marker="o", markersize=4)
    sizes = sorted({_size("S", r) for r in found})
    axes.set(xscale="log", xlabel="S", ylabel="valid tokens/s")
    axes.set_xticks(sizes, [str(S) for S in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(f"{found[0]['detail']['model']}, {found[0]['dtype']}, {found[0]['device']}", fontsize=9)
    return figure


def scale(estimates: Mapping[str, Sequence[Any]], title: str) -> Figure:
    """Estimated tokens/s against the number of devices, with one line per way to exchange gradients and get tokens."""
    labels = {
        "float32": "exchange in float32",
        "bfloat16": "exchange in bfloat16",
        "text": "every process tokenizes the text",
    }
    with matplotlib.rc_context(_SETTINGS):
        figure, (axes,) = _axes()
        for name, found in estimates.items():
            if found:
                points = [(each.devices, each.tokens_per_s) for each in found]
                axes.plot(*zip(*points, strict=True), label=labels[name], marker="o", markersize=4)
        first = estimates["float32"][0]
        devices = [each.devices for each in estimates["float32"]]
        ideal = [first.tokens_per_s * n / first.devices for n in devices]
        axes.plot(devices, ideal, label="proportional", color="0.6", linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="tokens/s, estimated")
        axes.set_xticks(devices, [str(n) for n in devices], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
        axes.set_title(title, fontsize=7)
    return figure


FIGURES: dict[str, tuple[Callable[[Records], Figure | None], str]] = {
    "time": (time, "time of loss and gradient against sequence length and batch"),
    "roofline": (roofline, "time relative to the exponentials alone"),
    "memory": (memory, "peak memory against sequence length and batch"),
    "batch": (batch, "largest batch that fits"),
    "train_step": (train_step, "tokens per second of a training step against sequence length"),
    "accuracy": (accuracy, "relative error of the loss against the divergence"),
}


def draw(name: str, records: Records) -> Figure | None:
    with matplotlib.rc_context(_SETTINGS):
        return FIGURES[name][0](records)


def svg(figure: Figure) -> str:
    """The figure as an SVG element for a page; equal records give equal text."""
    out = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


def png(figure: Figure, file: Path) -> None:
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(file, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
