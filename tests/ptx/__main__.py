"""Emulates random calls of both kernel families and prints a table. See tests/ptx/README.md.

The exit status is 1 if a result is wrong or a kernel violates a rule.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import torch

from .build import FOLDER
from .calls import Call, draw, judge, parsed
from .device import Device, Poisoned
from .findings import Finding
from .launch_cuda import GPUS, cuda_backend
from .launch_triton import ARCHITECTURES, triton_backend


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that this command and mutate.py share."""
    parser.add_argument(
        "--fix", nargs="*", default=[], metavar="NAME=VALUE", help="fixes random choices, e.g. dtype=bfloat16 length=64"
    )
    parser.add_argument(
        "--gpu",
        choices=sorted(GPUS),
        default="crowded",
        help="cuda: the GPU; its shared memory decides the warps of a block and which path a call takes",
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder for compiled code")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=("triton", "cuda"), default=["triton", "cuda"])
    parser.add_argument("--cases", type=int, default=20, help="calls of each family")
    parser.add_argument("--first", type=int, default=0, help="seed of the first call")
    parser.add_argument(
        "--architecture", type=int, choices=ARCHITECTURES, default=80, help="triton: 80 has mma.sync, 90 wgmma"
    )
    parser.add_argument("--no-races", action="store_true", help="without the race detector, twice as fast")
    parser.add_argument("--verbose", action="store_true", help="prints a line for every call")
    parser.add_argument("--seconds", type=float, default=1e9, help="no call begins after this time")
    add_arguments(parser)
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    torch.set_num_threads(1)
    only = parsed(options.fix)
    device = Device(races=not options.no_races)
    table: defaultdict[tuple[str, str, str], list[tuple]] = defaultdict(list)
    notes: defaultdict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    begin, failed, refused = time.perf_counter(), 0, 0
    with ExitStack() as stack:
        if "triton" in options.families:
            stack.enter_context(triton_backend(device, options.architecture, options.folder))
        if "cuda" in options.families:
            stack.enter_context(cuda_backend(device, options.gpu, options.folder))
        for seed in range(options.first, options.first + options.cases):
            for family in options.families:
                if time.perf_counter() - begin > options.seconds:
                    continue
                call = draw(seed, only)
                start = time.perf_counter()
                worst, wrong, findings = outcome(device, call, family)
                if wrong and "cannot serve this call" in wrong[0]:  # the backend refused it: too little shared memory
                    refused += 1
                    continue
                found = [str(finding) for finding in findings if not finding.is_note]
                for finding in findings:
                    if finding.is_note:
                        notes[family, finding.kind, finding.kernel, finding.source].append(seed)
                seconds = time.perf_counter() - start
                emulated = sum(launch[3] for launch in device.launches)
                if options.verbose:
                    print(f"{worst:7.1%} {seconds:6.1f} s  {family}, {call.label}", flush=True)
                table[family, call.dtype, call.mask].append((worst, bool(wrong), len(found), seconds, emulated))
                if wrong or found:
                    failed += 1
                    print(f"FAILED {family}, {call.label}", *wrong, *found, sep="\n    ", flush=True)
    _print(table)
    print(
        f"{sum(map(len, table.values()))} calls were judged, {failed} failed, {refused} were refused by their backend"
    )
    _print_coverage(device)
    for (family, kind, kernel, source), seeds in notes.items():
        print(f"{kind}: {family} {kernel} ({source}), in {len(set(seeds))} calls, the first of seed {seeds[0]}")
    return 1 if failed else 0


def outcome(device: Device, call: Call, family: str) -> tuple[float, list[str], list[Finding]]:
    """The largest error relative to its tolerance, a message for each wrong result, and the findings in the kernels."""
    device.reset()
    try:
        with Poisoned():
            worst, wrong = judge(call, family)
    except Exception as error:  # any error is an outcome of the call
        worst, wrong = float("inf"), [f"{type(error).__name__}: {error}"]
    return worst, wrong, device.findings.take()


def _print(table) -> None:
    print(
        f"\n{'family':8}{'dtype':10}{'mask':15}{'calls':>6}{'wrong':>6}{'found':>6}"
        f"{'worst error':>12}{'seconds':>9}{'emulated':>9}"
    )
    for (family, dtype, mask), results in sorted(table.items()):
        worst, wrong, found, seconds, emulated = zip(*results, strict=True)
        count = len(results)
        print(
            f"{family:8}{dtype:10}{mask:15}{count:6}{sum(wrong):6}{sum(map(bool, found)):6}{max(worst):11.0%} "
            f"{sum(seconds) / count:9.2f}{sum(emulated) / count:9.2f}"
        )
    print("worst error: part of what is allowed; seconds: of a call, compilation included; emulated: the kernels alone")


def _print_coverage(device: Device) -> None:
    """Prints which part of the compiled code was executed, summed over all variants of each kernel."""
    reached: defaultdict[str, int] = defaultdict(int)
    whole: defaultdict[str, int] = defaultdict(int)
    variants: defaultdict[str, int] = defaultdict(int)
    for kernel in device.kernels.values():
        variants[kernel.name] += 1
        whole[kernel.name] += sum(len(block.instructions) for block in kernel.blocks)
        reached[kernel.name] += sum(len(block.instructions) for block in kernel.blocks if block.reached)
    for name, count in sorted(whole.items()):
        print(f"executed of {name}: {reached[name] / count:.0%} of {count} instructions, {variants[name]} variants")


if __name__ == "__main__":
    raise SystemExit(main())
