"""`python -m benchmarks scale`: estimates tokens/s on 1 to 1024 devices from measured parts, and says what binds.

Measured are the passes of one device over 1 and more samples and the optimizer (suite `train_step`), and the speeds of
the tokenizer and of reading prepared tokens (suite `data`). The exchange between devices is computed from a bandwidth.
Everything else is assumed as printed. The result is an estimate: no such number of devices was measured.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure.layouts import LAYOUTS
from benchmarks.measure.records import RESULTS, Record, read
from benchmarks.reporting import figures
from benchmarks.reporting.tables import Records, Table, fill, suite
from examples.demo.markers import markers, update

NAME = "scale"
# Bytes per second that leave a node of eight devices in one direction, by data sheets.
NETWORKS = {
    "nvlink": (450e9, "NVLink of every device, 450 GB/s"),
    "infiniband": (400e9, "eight InfiniBand adapters of 400 Gbit/s a node"),
    "ethernet": (12.5e9, "Ethernet of 100 Gbit/s a node"),
}
SMALL_PASSES = "batch size: small passes"  # most of their time does not depend on the number of samples
_PASS = ("teacher", "student", "loss", "backward")
_BYTES = {"float32": 4, "bfloat16": 2}


class Parts(NamedTuple):
    """Measured parts of one device.

    Attributes:
        passes: milliseconds of teacher, student, loss and backward, by the number of samples of a pass.
        backward: share of the backward in the largest of them.
        optimizer: milliseconds of clipping and the optimizer.
        tokens: valid tokens of a sample.
        elements: elements of the gradient.
        last: those of the embeddings, whose gradient comes at the end of the backward.
        reading, tokenizing: tokens per second of one process; None if not known.
    """

    passes: dict[int, float]
    backward: float
    optimizer: float
    tokens: float
    elements: int
    last: int
    reading: float | None = None
    tokenizing: float | None = None

    def compute(self, samples: int) -> float:
        """Milliseconds of passes over these samples.

        Full passes have the largest measured number of samples. The rest is interpolated between measured numbers, and
        takes no less than the smallest of them.
        """
        sizes = sorted(self.passes)
        full, rest = divmod(samples, sizes[-1])
        ms = full * self.passes[sizes[-1]]
        if rest:
            above = next(size for size in sizes if size >= rest)
            below = max((size for size in sizes if size <= rest), default=above)
            share = (rest - below) / (above - below) if above > below else 0.0
            ms += self.passes[below] + share * (self.passes[above] - self.passes[below])
        return ms


class Setup(NamedTuple):
    """The assumptions about the devices and the run.

    Attributes:
        samples: samples of an optimizer step, over all devices.
        node: devices of a node.
        inside, between: bytes per second in one direction, of a device inside a node and of a node.
        latency: seconds of a message.
        element_bytes: bytes of a gradient's element in the exchange.
        text: True if every process tokenizes the whole text, False if it reads its own samples' tokens.
    """

    samples: int
    node: int
    inside: float
    between: float
    latency: float
    element_bytes: int
    text: bool = False


class Estimate(NamedTuple):
    """Milliseconds of a step on some devices and of its parts; `exchange` is its part after the last backward."""

    devices: int
    share: int  # samples of the device that has most
    compute: float
    exchange: float
    optimizer: float
    data: float
    step: float
    tokens_per_s: float
    efficiency: float
    binds: str


def exchange_ms(devices: int, size: int, setup: Setup) -> float:
    """Milliseconds of an all-reduce: each device sends 2 (n - 1) / n times the bytes, after 2 log2(n) latencies."""
    if devices == 1:
        return 0.0
    rate = setup.inside if devices <= setup.node else min(setup.inside, setup.between)
    return 1e3 * (2 * (devices - 1) / devices * size / rate + 2 * math.ceil(math.log2(devices)) * setup.latency)


def estimate(parts: Parts, setup: Setup, devices: int) -> Estimate:
    """The step on this number of devices. Its samples are divided evenly; with fewer samples, devices are idle."""
    busy = min(devices, setup.samples)
    share = math.ceil(setup.samples / busy)
    compute = parts.compute(share)
    whole, last = (exchange_ms(busy, n * setup.element_bytes, setup) for n in (parts.elements, parts.last))
    exposed = max(last, whole - parts.backward * min(compute, parts.compute(min(share, max(parts.passes)))))
    rate = parts.tokenizing if setup.text else parts.reading
    own = (setup.samples if setup.text else share) * parts.tokens
    data = 1e3 * own / rate if rate else 0.0
    work = compute + exposed + parts.optimizer
    step = max(work, data)
    tokens_per_s = 1e3 * setup.samples * parts.tokens / step
    alone = tokens_per_s if devices == 1 else estimate(parts, setup, 1).tokens_per_s
    if busy < devices:
        binds = f"batch size: {devices - busy} idle"
    elif data > work:
        binds = "data"
    else:
        most = max(parts.passes)
        full = share * parts.passes[most] / most
        longest = {"compute": full, SMALL_PASSES: compute - full, "exchange": exposed, "optimizer": parts.optimizer}
        binds = max(longest, key=lambda name: longest[name])
    efficiency = tokens_per_s / alone / devices
    return Estimate(devices, share, compute, exposed, parts.optimizer, data, step, tokens_per_s, efficiency, binds)


def register(commands: argparse._SubParsersAction) -> None:
    about = "estimate tokens/s on 1 to 1024 devices from measured parts"
    parser = commands.add_parser("scale", help=about, description=__doc__)
    add = parser.add_argument
    add("records", type=Path, nargs="*", default=[RESULTS], help="files of records, or folders of such files")
    add("--device", default="", help="part of the name of the measured device; default: that of the last record")
    add("--model", help="the measured model; default: that of the last record")
    add("--layout", choices=list(LAYOUTS), help="the measured layout; default: that of the last record")
    add("--length", type=int, default=512, help="tokens of a sample")
    add("--samples", type=int, default=256, help="samples of an optimizer step")
    add("--devices", type=int, nargs="+", default=[2**n for n in range(11)], help="numbers of devices")
    add("--node", type=int, default=8, help="devices of a node")
    named = ", ".join(f"{name} ({about})" for name, (_, about) in NETWORKS.items())
    add("--network", default="infiniband", help=f"between nodes: {named}, or GB/s of a node")
    add("--inside", default="nvlink", help="within a node: the same names, or GB/s of a device")
    add("--latency", type=float, default=20.0, help="microseconds of a message")
    add("--reading-rate", type=float, help="tokens/s that a process reads; default: measured")
    add("--tokenizing-rate", type=float, help="tokens/s that a process tokenizes; default: measured")
    add("--update", type=Path, metavar="FILE", help=f"Markdown file with {markers(NAME)[0]}")
    add("--plots", type=Path, metavar="FOLDER", help="write the plot there as PNG; --update links it")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> None:
    for name in ("length", "samples", "node"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected 1 or more, got {getattr(options, name)}")
    if min(options.devices) < 1:
        raise ValueError(f"--devices: expected 1 or more, got {min(options.devices)}")
    found = _chosen(read(options.records), options)
    parts = _parts(found, read(options.records), options)
    setups = {name: _setup(options, size) for name, size in _BYTES.items()}
    estimates = {name: [estimate(parts, setup, n) for n in options.devices] for name, setup in setups.items()}
    text = setups["float32"]._replace(text=True)
    estimates["text"] = [estimate(parts, text, n) for n in options.devices] if parts.tokenizing else []
    made = _table(found[-1], parts, setups["float32"], estimates, options).markdown()
    if options.plots is not None:
        figure = figures.scale(estimates, _title(found[-1]))
        options.plots.mkdir(parents=True, exist_ok=True)
        figures.png(figure, options.plots / f"{NAME}.png")
        if options.update is not None:
            link = os.path.relpath(options.plots / f"{NAME}.png", options.update.parent)
            made += f"\n\n![estimated tokens per second against the number of devices]({link})"
    if options.update is not None:
        update(options.update, NAME, made)
    else:
        print(made)


def _chosen(records: Records, options: argparse.Namespace) -> list[Record]:
    """The records of the same kind as the last one that the options admit."""
    wanted = {"model": options.model, "layout": options.layout}
    found = [
        r
        for r in suite("train_step", records)
        if r["status"] == "ok"
        and options.device in r["device"]
        and r["shape"]["S"] == options.length
        and r["detail"]["processes"] == 1
        and all(value in (None, r["detail"][name]) for name, value in wanted.items())
    ]
    if not found:
        raise ValueError(
            f"records: expected measured steps of suite train_step with S = {options.length} and the given device, "
            "model and layout, found none"
        )
    return [r for r in found if _kind(r) == _kind(found[-1])]


def _kind(record: Record) -> tuple[Any, ...]:
    return record["device"], record["dtype"], record["provider"], record["detail"]["model"], record["detail"]["layout"]


def _parts(found: Sequence[Record], records: Records, options: argparse.Namespace) -> Parts:
    passes = {}
    for record in found:
        stages = record["detail"]["stages_ms"]
        passes[record["shape"]["B"]] = sum(stages[stage] for stage in _PASS)
    largest = max(found, key=lambda r: r["shape"]["B"])
    detail, B = largest["detail"], largest["shape"]["B"]
    data = [r for r in suite("data", records) if r["status"] == "ok"]
    speeds = {r["provider"]: r["detail"]["tokens_per_s"] for r in data if r["provider"] in ("reading", "tokenizer")}
    return Parts(
        passes,
        detail["stages_ms"]["backward"] / passes[B],
        detail["stages_ms"]["optimizer"],
        detail["tokens"] / B,
        detail["gradient_elements"],
        detail["embedding_elements"],
        options.reading_rate or speeds.get("reading"),
        options.tokenizing_rate or speeds.get("tokenizer"),
    )


def _setup(options: argparse.Namespace, element_bytes: int) -> Setup:
    inside, between = (_rate(name, getattr(options, name)) for name in ("inside", "network"))
    return Setup(options.samples, options.node, inside, between, 1e-6 * options.latency, element_bytes)


def _rate(option: str, text: str) -> float:
    """Bytes per second from a name of `NETWORKS` or a number of GB/s."""
    if text in NETWORKS:
        return NETWORKS[text][0]
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise ValueError(f"--{option}: expected {', '.join(NETWORKS)} or GB/s, got {text!r}")
    return 1e9 * rate


def _title(record: Record) -> str:
    return f"Estimates from parts measured on {record['device']}: {record['detail']['model']}, {record['dtype']}"


def _table(
    record: Record, parts: Parts, setup: Setup, estimates: dict[str, list[Estimate]], options: argparse.Namespace
) -> Table:
    """The estimates, with the assumptions as caption."""
    rates = [
        f"{what} {rate:,.0f} tokens/s" if rate else f"{what} not known and left out"
        for what, rate in (("reading of prepared tokens", parts.reading), ("tokenizing", parts.tokenizing))
    ]
    sizes = ", ".join(map(str, sorted(parts.passes)))
    detail = record["detail"]
    caption = (
        f"Estimates, not measurements, for devices like the one on which the parts were measured ({record['device']}, "
        f"revision {record['revision']}): {detail['model']}, {record['dtype']}, layout {detail['layout']}, "
        f"S = {options.length}, {setup.samples} samples a step. Measured: passes over {sizes} samples, "
        f"{parts.optimizer:.3g} ms of the optimizer, {rates[0]} and {rates[1]} a process. Computed: an all-reduce of "
        f"{parts.elements / 1e6:.1f} million gradients by a ring, {setup.inside / 1e9:g} GB/s for a device in a node "
        f"of {setup.node} and {setup.between / 1e9:g} GB/s for a node, {1e6 * setup.latency:g} µs a message; it "
        f"overlaps with the last backward, except for the embeddings ({parts.last / 1e6:.1f} million). Assumed: all "
        "devices are equally fast and do not wait for one another otherwise, and data are read while a device "
        "computes. Times in ms; binds: the longest part of a step:"
    )
    header = ["devices", "samples a device", "compute", "exchange", "optimizer", "data", "step", "tokens/s"]
    header += ["efficiency", "binds", "tokens/s, exchange in bfloat16", "tokens/s, every process tokenizes the text"]
    lines = []
    for number, each in enumerate(estimates["float32"]):
        others = [estimates[name][number].tokens_per_s if estimates[name] else None for name in ("bfloat16", "text")]
        times = (each.compute, each.exchange, each.optimizer, each.data, each.step)
        cells = [str(each.devices), str(each.share), *(fill("{ms:3}", {"ms": ms}) for ms in times)]
        cells += [f"{each.tokens_per_s:,.0f}", f"{100 * each.efficiency:.0f} %", each.binds]
        lines.append([*cells, *(fill("{rate:,.0f}", {"rate": rate}) for rate in others)])
    return Table(caption, header, lines)
