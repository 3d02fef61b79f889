"""Tables from records, by the declarations of report.toml."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from benchmarks.measure.records import Record
from benchmarks.roofline import NAME as EXPONENTIALS

Records = Sequence[Record]
Fields = list[dict[str, Any]]

_MODES = {"full": "Loss and gradient", "forward": "Loss without gradient", "backward": "Backward"}
_METHODS = {"graph": ", CUDA graph replay", "events": ", CUDA events"}
_USUAL = {"relations": "qq", "mask": "none", "dtype": "float32", "mode": "full"}


class Table(NamedTuple):
    """A table with cells of text. The first column names the line."""

    caption: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        rule = ["---", *["--:"] * (len(self.header) - 1)]
        lines = "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rule, *self.lines))
        return f"{self.caption}\n\n{lines}"


# Formats of report.toml, in addition to Python's.
_FORMATS: dict[str, Callable[[Any], str]] = {
    "3": lambda value: format(value, ".0f" if abs(value) >= 1000 else ".3g"),
    "MiB": lambda value: format(value / 2**20, ".0f" if value >= 2**23 else ".1f"),
    "x": lambda value: f"{value:.1f} ×",
    "%": lambda value: f"{100 * value:.0f} %",
    "M": lambda value: f"{value / 1e6:.1f}",
    "h": lambda value: format(value, ",.0f" if value >= 100 else ".1f"),
    "size": lambda value: value.replace("x", " × "),
}


class _Formatter(string.Formatter):
    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Any) -> Any:
        return kwargs.get(key)

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "–"
        return _FORMATS.get(format_spec, lambda value: format(value, format_spec))(value)


def fill(template: str, found: dict[str, Any]) -> str:
    return _Formatter().vformat(template, (), found)


def fields(record: Record) -> dict[str, Any]:
    """The values that templates can name: keys, sizes and details of a record, and values computed from them."""
    found = {**record, **record["shape"], **record["detail"], **record["detail"].get("stages_ms", {})}
    failed = None if record["status"] == "ok" else record["status"]
    found["where"] = fill("{device}, torch {torch}, revision {revision}", {**found, **(found["versions"] or {})})
    found["sizes"] = fill("widths {d_t} and {d_s}, relations {relations}", found)
    found["rows"] = found["B"] * found["A"] * found["S"]
    found["unusual"] = "".join(f", {found[name]}" for name, value in _USUAL.items() if found[name] != value)
    found["mode_name"], found["method_name"] = _MODES.get(found["mode"]), _METHODS.get(found["method"], "")
    found["graph"] = found["method"] == "graph"
    if found["median_ms"] is not None and found["pairs"]:
        found["ns_per_pair"] = 1e6 * found["median_ms"] / found["pairs"]
    # A measurement, or the reason why there is none.
    found["ms"] = failed or fill("{median_ms:3}", found)
    found["best"] = failed or fill("{best_ms:3}", found)
    found["memory"] = failed or fill("{peak_bytes:MiB} ({saved_bytes:MiB})", found)
    found["largest"] = failed or ("at least " if "most" in found else "") + str(found["B"])
    found["budget"] = found.get("budget_bytes", 0) / 2**30
    found["small_error"] = found.get("worst_row", found["error_value"])
    found["error_of"] = "scalar" if found.get("reduction") == "sequence" else "worst row"
    found["sign"] = " (negative)" if found.get("negative") else ""
    return found


@dataclass(frozen=True)
class Declared:
    """A kind of table, as report.toml declares it."""

    select: str
    key: str
    caption: str
    columns: Sequence[tuple[str, str]]
    line: str = ""
    pivot: tuple[str, str] | None = None
    add: str = ""

    def tables(self, records: Records) -> list[Table]:
        chosen = SELECT[self.select](records) if self.select in SELECT else suite(self.select, records)
        made = []
        for _, group in groups(map(fields, chosen), lambda found: fill(self.key, found)):
            if self.add:
                ADD[self.add](group)
            made.append(self._table(group))
        return made

    def _table(self, group: Fields) -> Table:
        lines = [[found] for found in group]
        if self.line:
            lines = [own for _, own in groups(group, lambda found: fill(self.line, found))]
        heading, cell = self.pivot or ("", "")
        pivoted = list(dict.fromkeys(fill(heading, found) for found in group)) if self.pivot else []
        body = []
        for own in lines:
            cells = {fill(heading, found): fill(cell, found) for found in own}
            body.append([fill(template, own[0]) for _, template in self.columns])
            body[-1] += [cells.get(name, "–") for name in pivoted]
        return Table(fill(self.caption, group[0]), [*(name for name, _ in self.columns), *pivoted], body)


def groups(records: Iterable[Record], key: Callable[[Record], Any]) -> list[tuple[Any, list[Record]]]:
    """Groups of records with equal keys, in the order in which the keys occur first."""
    found: dict[str, tuple[Any, list[Record]]] = {}
    for record in records:
        found.setdefault(repr(key(record)), (key(record), []))[1].append(record)
    return list(found.values())


def suite(name: str, records: Records) -> list[Record]:
    return [r for r in records if r["suite"] == name and (name != "train_step" or r["status"] != "unsupported")]


def providers(group: Records) -> list[Record]:
    """All records except those of the yardstick `exponentials`."""
    return [r for r in group if r["provider"] != EXPONENTIALS]


def _runs(records: Records) -> list[list[Record]]:
    """Records of the suite `loss` in groups of one run, workload, mode and method."""

    def key(r: Record) -> Any:
        return r["run"], r["device"], r["dtype"], r["mode"], r["shape"], r["method"] == "graph"

    return [group for _, group in groups(suite("loss", records), key)]


def comparisons(records: Records) -> list[list[Record]]:
    """Groups with records of two or more providers, measured side by side."""
    return [group for group in _runs(records) if len(providers(group)) > 1]


def alone(records: Records) -> list[Record]:
    """Records of providers that were measured alone."""
    return [found[0] for found in map(providers, _runs(records)) if len(found) == 1]


def largest_batches(records: Records) -> list[Record]:
    return [r for r in suite("memory", records) if "budget_bytes" in r["detail"] and r["status"] != "unsupported"]


def peaks(records: Records) -> list[Record]:
    """Records of peak memory, without providers that support none of the shapes."""
    found = [r for r in suite("memory", records) if "budget_bytes" not in r["detail"]]
    supported = {r["provider"] for r in found if r["status"] != "unsupported"}
    return [r for r in found if r["provider"] in supported]


def small_divergences(records: Records) -> list[Record]:
    """Records of errors at small divergences, without providers and reductions that have no measurement."""
    found = [r for r in suite("accuracy", records) if "kl" in r["detail"]]
    measured = {(r["provider"], r["mode"]) for r in found if r["status"] == "ok"}
    return [r for r in found if (r["provider"], r["mode"]) in measured]


def _data(records: Records, loop: bool) -> list[Record]:
    return [r for r in suite("data", records) if (r["provider"] == "loop") == loop]


SELECT: dict[str, Callable[[Records], list[Record]]] = {
    "compared": lambda records: [r for group in comparisons(records) for r in providers(group)],
    "alone": alone,
    "peaks": peaks,
    "largest_batches": largest_batches,
    "judged": lambda records: [r for r in suite("accuracy", records) if "allowed_grad" in r["detail"]],
    "small_divergences": small_divergences,
    "loop": partial(_data, loop=True),
    "pipeline": partial(_data, loop=False),
}


def _add_speedup(group: Fields) -> None:
    """The speed relative to `eager`, or to the base model."""
    times = [found["median_ms"] for found in group if found["provider"] in ("eager", "12x768")]
    for found in group:
        if times and times[-1] and found["median_ms"]:
            found["speedup"] = times[-1] / found["median_ms"]


def _add_ratio(group: Fields) -> None:
    """ns/pair relative to unmasked self relations of the same widths, from the same run if possible."""
    plain = [f for f in group if (f["status"], f["mode"], f["mask"]) == ("ok", "full", "none")]
    plain = [f for f in plain if f["relations"] in ("qq", "qq,kk,vv")]
    for found in group:
        same = [f for f in plain if (f["d_t"], f["d_s"]) == (found["d_t"], found["d_s"])]
        same = [f for f in same if f["run"] == found["run"]] or same
        if same and found["status"] == "ok":
            found["ratio"] = found["ns_per_pair"] / min(same, key=lambda f: abs(f["S"] - 512))["ns_per_pair"]


def _add_worst(group: Fields) -> None:
    """The number of records of each provider and dtype within the tolerance, and their worst errors."""
    masks = len({found["mask"] for found in group})
    for _, own in groups(group, lambda found: (found["provider"], found["dtype"])):
        measured = [found for found in own if found["error_value"] is not None]
        shares = (f[f"error_{what}"] / f[f"allowed_{what}"] for f in measured for what in ("value", "grad"))
        worst = {key: max((f[key] for f in measured), default=None) for key in ("error_value", "error_grad")}
        passed = sum(found["status"] == "ok" for found in own)
        own[0] |= {**worst, "share": max(shares, default=None), "passed": passed, "count": len(own), "masks": masks}


def _add_fewest(group: Fields) -> None:
    """The smallest number of runs."""
    group[0]["fewest"] = min((found["runs"] for found in group if found["runs"]), default=0)


def _add_per_token(group: Fields) -> None:
    """Times of a valid token relative to packed (else dense) samples of 512 tokens, and the sources of the MFU."""
    sources = "; ".join(sorted({found["mfu_of"] for found in group if "mfu_of" in found}))
    group[0]["sources"] = sources or "rate that was not measured"
    measured = sorted((found for found in group if found["status"] == "ok"), key=lambda found: found["B"])
    for layout in ("packed", "dense"):
        bases = {found["provider"]: found for found in measured if (found["layout"], found["S"]) == (layout, 512)}
        if bases:
            group[0]["base"] = f"{layout} samples of 512"
            break
    else:
        group[0]["base"] = "nothing measured"
    for found in measured:
        if base := bases.get(found["provider"]):
            for key, ms in (("relative", "best_ms"), ("relative_processor", "processor_ms")):
                found[key] = (found[ms] / found["tokens"]) / (base[ms] / base["tokens"])


def _add_tokenizer(group: Fields) -> None:
    """Tokens per second relative to the tokenizer alone."""
    for base in [found for found in group if (found["provider"], found["status"]) == ("tokenizer", "ok")][:1]:
        for found in (found for found in group if found["status"] == "ok"):
            for key, rate in (("relative", "tokens_per_s"), ("relative_processor", "tokens_per_processor_s")):
                found[key] = found[rate] / base[rate]


def _add_factors(group: Fields) -> None:
    """The time relative to another variant at the same shape; the variant without a base shows its time."""
    times = {(found["provider"], repr(found["shape"])): found["ns_per_pair"] for found in group}
    for found in group:
        base, each = found["relative_to"], found["ns_per_pair"]
        found["factor"] = f"{each / times[base, repr(found['shape'])]:.2f} ×" if base else f"{each:.2f}"
        found["unit"] = "" if base else ", ns/pair"


ADD: dict[str, Callable[[Fields], None]] = {
    "speedup": _add_speedup,
    "ratio": _add_ratio,
    "worst": _add_worst,
    "fewest": _add_fewest,
    "per_token": _add_per_token,
    "tokenizer": _add_tokenizer,
    "factors": _add_factors,
}
