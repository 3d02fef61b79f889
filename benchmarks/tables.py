"""Tables from rows: what README, docs and the HTML page show is made here and in plots.py, so no figure lacks a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

from .roofline import NAME as EXPONENTIALS
from .rows import Row


class Table(NamedTuple):
    """Cells as text; the first column is the name of the line."""

    caption: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        rule = ["---", *["--:"] * (len(self.header) - 1)]
        lines = "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rule, *self.lines))
        return f"{self.caption}\n\n{lines}"

    def html(self) -> str:
        def line(cells: Sequence[str], kind: str) -> str:
            return "<tr>" + "".join(f"<{kind}>{escape(cell).replace('`', '')}</{kind}>" for cell in cells) + "</tr>"

        body = "\n".join(line(cells, "td") for cells in self.lines)
        caption = escape(self.caption).replace("`", "")
        return (
            f'<p>{caption}</p>\n<div class="wide"><table><thead>{line(self.header, "th")}</thead>\n'
            f"<tbody>{body}</tbody></table></div>"
        )


def _number(value: float | None, form: str = ".3g", factor: float = 1.0) -> str:
    if value is None:
        return "–"
    value *= factor
    return format(value, ".0f" if form == ".3g" and abs(value) >= 1000 else form)


def _mib(value: float | None) -> str:
    return "–" if value is None else format(value / 2**20, ".0f" if value >= 2**23 else ".1f")


def _widths(shape: dict[str, Any]) -> str:
    return f"widths {shape['d_t']} and {shape['d_s']}"


def _where(row: Row) -> str:
    return f"{row['device']}, torch {row['versions']['torch']}, revision {row['revision']}"


def _failure(row: Row) -> str:
    return row["status"]


def _groups(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows with equal keys together, in the order in which the keys came first."""
    order: dict[str, int] = {}
    numbered = [(order.setdefault(repr(key(row)), len(order)), row) for row in rows]
    numbered.sort(key=lambda pair: pair[0])
    return [
        (key(members[0]), members)
        for members in ([row for _, row in group] for _, group in groupby(numbered, lambda pair: pair[0]))
    ]


def _measurements(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the loss in groups of one run, workload, mode and method."""
    loss = [row for row in rows if row["suite"] == "loss"]

    def key(row: Row) -> Any:
        return row["run"], row["device"], row["dtype"], row["mode"], row["shape"], row["method"] == "graph"

    return [members for _, members in _groups(loss, key)]


def comparisons(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that were measured side by side, of two providers or more."""
    return [members for members in _measurements(rows) if len(_contenders(members)) > 1]


def _contenders(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["provider"] != EXPONENTIALS]


def single(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one provider at many workloads, where it was measured alone."""
    alone = [_contenders(members)[0] for members in _measurements(rows) if len(_contenders(members)) == 1]
    return [members for _, members in _groups(alone, lambda row: (row["device"], row["provider"]))]


def loss(rows: Iterable[Row]) -> list[Table]:
    """Provider beside provider, a table a workload."""
    header = (
        "provider",
        "ms",
        "ns a pair",
        "faster than eager",
        "peak memory, MiB",
        "error of the loss",
        "of the gradient",
    )
    made = []
    for members in comparisons(rows):
        first, shape = members[0], members[0]["shape"]
        by_name = {row["provider"]: row for row in members if row["status"] == "ok"}
        eager = by_name["eager"]["median_ms"] if "eager" in by_name else None
        lines = []
        for row in _contenders(members):
            cells = [f"`{row['provider']}`"]
            if row["status"] != "ok":
                lines.append(
                    [
                        *cells,
                        _failure(row),
                        *["–"] * 3,
                        _number(row["error_value"], ".0e"),
                        _number(row["error_grad"], ".0e"),
                    ]
                )
                continue
            cells += [_number(row["median_ms"]), _number(row["median_ms"] / row["pairs"], ".3g", 1e6)]
            cells += ["–" if eager is None else f"{eager / row['median_ms']:.1f} ×", _mib(row["peak_bytes"])]
            lines.append([*cells, _number(row["error_value"], ".0e"), _number(row["error_grad"], ".0e")])
        what = {"full": "Loss and gradient", "forward": "Loss without gradient", "backward": "Backward"}[first["mode"]]
        method = {"graph": ", CUDA graph replay", "events": ", CUDA events"}.get(first["method"] or "", "")
        caption = (
            f"B = {shape['B']}, A = {shape['A']}, S = {shape['S']}, {_widths(shape)}, relations {shape['relations']}, "
            f"{first['dtype']}, mask {shape['mask']}. {what}, medians of one run{method} on {_where(first)}:"
        )
        made.append(Table(caption, header, lines))
    return made


def cases(rows: Iterable[Row]) -> list[Table]:
    """One provider at many workloads; ratios of ns a pair, hidden pairs counted, within one run if it can be."""
    header = ("workload", "ms", "p20–p80", "ns a pair", "ratio", "peak memory, MiB", "error of the gradient")
    made = []
    for members in single(rows):
        plain = {widths: _usual(own) for widths, own in _groups(members, _head_widths)}
        same_run = {key: _usual(own) for key, own in _groups(members, lambda row: (row["run"], _head_widths(row)))}
        lines: list[list[str]] = []
        for row in members:
            shape = row["shape"]
            name = f"B {shape['B']}, A {shape['A']}, S {shape['S']}, {shape['d_t']}/{shape['d_s']}"
            name += "".join(
                f", {text}"
                for text, plain in (
                    (shape["relations"], "qq"),
                    (shape["mask"], "none"),
                    (row["dtype"], "float32"),
                    (row["mode"], "full"),
                )
                if text != plain
            )
            if any(name == line[0] for line in lines):  # what others were compared with, in another run again
                continue
            if row["status"] != "ok":
                lines.append([name, _failure(row), *["–"] * 5])
                continue
            usual = same_run[row["run"], _head_widths(row)] or plain[_head_widths(row)]
            each = row["median_ms"] / row["pairs"]
            ratio = "–" if usual is None else f"{each / (usual['median_ms'] / usual['pairs']):.2f}"
            span = f"{row['p20_ms']:.3g}–{row['p80_ms']:.3g}"
            lines.append(
                [
                    name,
                    _number(row["median_ms"]),
                    span,
                    _number(each, ".3g", 1e6),
                    ratio,
                    _mib(row["peak_bytes"]),
                    _number(row["error_grad"], ".0e"),
                ]
            )
        caption = (
            f"`{members[0]['provider']}`, on {_where(members[0])}; loss and gradient, unless forward is said. Ratio: "
            "of ns a pair to that of unmasked self relations of the same widths at S = 512, or next to it:"
        )
        made.append(Table(caption, header, lines))
    return made


def _head_widths(row: Row) -> tuple[int, int]:
    return row["shape"]["d_t"], row["shape"]["d_s"]


def _usual(rows: Sequence[Row]) -> Row | None:
    """The row that others are compared with: unmasked self relations, S = 512 if there is one."""
    plain = [
        row
        for row in rows
        if row["status"] == "ok"
        and row["shape"]["mask"] == "none"
        and row["shape"]["relations"] in ("qq", "qq,kk,vv")
        and row["mode"] == "full"
    ]
    return min(plain, key=lambda row: abs(row["shape"]["S"] - 512), default=None)


def is_batch(row: Row) -> bool:
    return row["suite"] == "memory" and "budget_bytes" in row["detail"]


def memory(rows: Iterable[Row]) -> list[Table]:
    """Peak memory: a line a provider, a column a shape."""
    peaks = [row for row in rows if row["suite"] == "memory" and not is_batch(row)]
    made = []
    for (_, dtype), members in _groups(peaks, lambda row: (row["device"], row["dtype"])):
        shapes = [shape for shape, _ in _groups(members, lambda row: row["shape"])]
        lines = []
        for name, own in _groups(members, lambda row: row["provider"]):
            if all(row["status"] == "unsupported" for row in own):
                continue
            found = {repr(row["shape"]): row for row in own}
            cells = []
            for shape in shapes:
                row = found.get(repr(shape))
                if row is None or row["status"] != "ok":
                    cells.append("–" if row is None else row["status"])
                else:
                    cells.append(f"{_mib(row['peak_bytes'])} ({_mib(row['saved_bytes'])})")
            lines.append([f"`{name}`", *cells])
        shape = shapes[0]
        caption = (
            f"Peak memory of loss and gradient beyond the inputs, in brackets what is saved for the backward, MiB. "
            f"A = {shape['A']}, {_widths(shape)}, relations {shape['relations']}, {dtype}, on {_where(members[0])}:"
        )
        made.append(Table(caption, ("provider", *(f"B = {s['B']}, S = {s['S']}" for s in shapes)), lines))
    return made


def batches(rows: Iterable[Row]) -> list[Table]:
    """The largest batch that fits."""
    made = []
    found = [row for row in rows if is_batch(row)]

    def key(row: Row) -> Any:
        shape = {name: value for name, value in row["shape"].items() if name != "B"}
        return row["device"], row["dtype"], shape, row["detail"]["budget_bytes"]

    for (_, dtype, shape, budget), members in _groups(found, key):
        lines = []
        for row in members:
            if row["status"] == "unsupported":
                continue
            if row["status"] != "ok":
                lines.append([f"`{row['provider']}`", row["status"], "–"])
                continue
            more = "at least " if "most" in row["detail"] else ""
            lines.append([f"`{row['provider']}`", f"{more}{row['shape']['B']}", _mib(row["peak_bytes"])])
        caption = (
            f"Largest batch whose heads, gradients and temporaries fit {budget / 2**30:g} GiB: A = {shape['A']}, "
            f"S = {shape['S']}, {_widths(shape)}, relations {shape['relations']}, {dtype}, on {_where(members[0])}:"
        )
        made.append(Table(caption, ("provider", "largest B", "peak memory beyond the heads, MiB"), lines))
    return made


def _worst(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def accuracy(rows: Iterable[Row]) -> list[Table]:
    """Worst error over masks, shapes and relations, and the same as a share of what is allowed."""
    made = []
    found = [row for row in rows if row["suite"] == "accuracy"]
    for _, members in _groups(found, lambda row: row["device"]):
        masks = [row for row in members if "allowed_grad" in row["detail"]]
        lines = []
        for (name, dtype), own in _groups(masks, lambda row: (row["provider"], row["dtype"])):
            fit = sum(row["status"] == "ok" for row in own)
            share = _worst(
                row[f"error_{what}"] / row["detail"][f"allowed_{what}"]
                for row in own
                for what in ("value", "grad")
                if row[f"error_{what}"] is not None
            )
            errors = [_number(_worst(row[key] for row in own), ".0e") for key in ("error_value", "error_grad")]
            lines.append([f"`{name}`", dtype, f"{fit} of {len(own)}", *errors, _number(share, ".2f")])
        if lines:
            count = len({row["shape"]["mask"] for row in masks})
            caption = (
                f"Largest relative errors over {count} masks, self and cross relations, against dense float64, on "
                f"{_where(members[0])}. Allowed: twice the error of dense PyTorch in the same dtype, plus one rounding:"
            )
            header = (
                "provider",
                "dtype",
                "passed",
                "error of the loss",
                "of the gradient",
                "worst share of the allowed",
            )
            made.append(Table(caption, header, lines))
        small = [row for row in members if "kl" in row["detail"]]
        made += _small(small)
    return made


def _small(rows: Sequence[Row]) -> list[Table]:
    columns = _groups(rows, lambda row: (row["provider"], row["detail"]["reduction"]))
    columns = [(key, own) for key, own in columns if any(row["status"] == "ok" for row in own)]
    if not columns:
        return []
    lines = []
    for kl, members in _groups(rows, lambda row: row["detail"]["kl"]):
        found = {(row["provider"], row["detail"]["reduction"]): row for row in members}
        cells = []
        for key, _ in columns:
            row = found.get(key)
            error = None if row is None else row["detail"].get("worst_row", row["error_value"])
            sign = " (negative)" if row is not None and row["detail"].get("negative") else ""
            cells.append(_number(error, ".0e") + sign)
        lines.append([f"{kl:.0e}", *cells])
    names = {"sequence": "scalar", "none": "worst row"}
    header = ("KL", *(f"`{provider}`, {names[reduction]}" for (provider, reduction), _ in columns))
    shape = rows[0]["shape"]
    caption = (
        f"Relative error where teacher and student almost agree, float32, {shape['B'] * shape['A'] * shape['S']} rows:"
    )
    return [Table(caption, header, lines)]


def step(rows: Iterable[Row]) -> list[Table]:
    """A distillation step by stages."""
    made = []
    found = [row for row in rows if row["suite"] == "step"]
    header = ["loss by", "B", "step, ms", "teacher", "student", "loss", "backward", "optimizer", "share of the loss"]
    header += ["tokens/s", "MFU", "peak memory, MiB", "recipe, h"]

    def key(row: Row) -> Any:
        return row["device"], row["dtype"], row["detail"]["model"], row["shape"]["S"], row["shape"]["mask"]

    for (_, dtype, model, S, mask), members in _groups(found, key):
        lines = []
        for row in members:
            if row["status"] == "unsupported":
                continue
            cells = [f"`{row['provider']}`", str(row["shape"]["B"])]
            if row["status"] != "ok":
                lines.append([*cells, row["status"], *["–"] * (len(header) - 3)])
                continue
            detail = row["detail"]
            cells += [_number(row["median_ms"]), *(_number(value) for value in detail["stages_ms"].values())]
            cells += [f"{100 * detail['loss_share']:.0f} %", f"{detail['tokens_per_s']:.3g}"]
            hours = format(detail["recipe_hours"], ",.0f" if detail["recipe_hours"] >= 100 else ".1f")
            lines.append([*cells, f"{100 * detail['mfu']:.0f} %", _mib(row["peak_bytes"]), hours])
        sources = {row["detail"]["mfu_of"] for row in members if "mfu_of" in row["detail"]}
        caption = (
            f"{model}, S = {S}, mask {mask}, {dtype}, on {_where(members[0])}. Loss: with its gradient for Q, K and V. "
            f"MFU: of a {'; '.join(sorted(sources)) or 'rate that was not measured'}. Recipe: 400 000 steps of "
            "256 × 512 tokens at this rate:"
        )
        if lines:
            made.append(Table(caption, header, lines))
    return made


def inference(rows: Iterable[Row]) -> list[Table]:
    """Speed-up over the 12 × 768 base, published and measured."""
    made = []
    found = [row for row in rows if row["suite"] == "inference"]
    header = ("layers × hidden size", "ms", "speed-up", "published", "million parameters", "published", "error")
    for (_, dtype, shape), members in _groups(
        found, lambda row: (row["device"], row["dtype"], {k: row["shape"][k] for k in ("B", "S")})
    ):
        base = next((row for row in members if row["provider"] == "12x768" and row["status"] == "ok"), None)
        lines = []
        for row in members:
            name, detail = row["provider"].replace("x", " × "), row["detail"]
            if row["status"] != "ok":
                lines.append([name, row["status"], *["–"] * 5])
                continue
            speedup = "–" if base is None else f"{base['median_ms'] / row['median_ms']:.1f} ×"
            published = detail["published_million_parameters"]
            cells = [_number(row["median_ms"]), speedup, f"{detail['published_speedup']:.1f} ×"]
            cells += [f"{detail['parameters'] / 1e6:.1f}", "–" if published is None else str(published)]
            lines.append([name, *cells, _number(row["error_value"], ".0e")])
        caption = (
            f"Last hidden states of {shape['B']} × {shape['S']} tokens, BERT's vocabulary, random weights, {dtype}, on "
            f"{_where(members[0])}. Parameters: word embeddings and layers, as the papers count:"
        )
        made.append(Table(caption, header, lines))
    return made
