"""Command line: `python -m minilm_kernels precompile` compiles CUDA kernels ahead of time, without a GPU."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .relation.backends.cuda_cache import VARIABLE, KernelCache
from .relation.backends.cuda_compiler import OLDEST, CompilerError, Kernel, compile_kernels, kernel_names

_DTYPES = ("bfloat16", "float16", "float32")


def _widths(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(
        re.fullmatch(r"\s*\d{1,5}\s*", part, flags=re.ASCII) and int(part) > 0 for part in parts
    ):
        raise argparse.ArgumentTypeError(f"expected the head widths of teacher and student, such as 16,8; got {text!r}")
    return int(parts[0]), int(parts[1])


def _architecture(text: str) -> int:
    number = text.replace(".", "")
    if not re.fullmatch(r"\d{2,3}|\d{1,2}\.\d", text, flags=re.ASCII) or int(number) < OLDEST:
        raise argparse.ArgumentTypeError(f"expected a compute capability from {OLDEST} on, such as 90; got {text!r}")
    return int(number)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m minilm_kernels", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    precompile = commands.add_parser(
        "precompile",
        allow_abbrev=False,
        help="compile the CUDA kernels for the given GPUs and head widths into the cache",
        description="Compiles the kernels of the cuda backend into the cache, so that the first call does not have to: "
        "for container images, and for clusters whose nodes have no writable home directory. No GPU is needed. The "
        "machine that runs the kernels needs the same versions of this package and of NVRTC.",
    )
    precompile.add_argument(
        "--arch", type=_architecture, nargs="+", metavar="CC", help="compute capabilities, such as 90 for H100 and H200"
    )
    precompile.add_argument(
        "--widths",
        type=_widths,
        action="append",
        metavar="T,S",
        help="head widths of teacher and student, such as 16,8; can be repeated",
    )
    precompile.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="student's dtype (default: bfloat16)")
    precompile.add_argument("--teacher-dtype", choices=_DTYPES, help="teacher's dtype (default: the student's)")
    precompile.add_argument("--cache", type=Path, metavar="FOLDER", help=f"cache folder (default: ${VARIABLE})")
    precompile.add_argument("--list", action="store_true", help="list the kernels in the cache")
    precompile.add_argument("--clear", action="store_true", help="empty the cache first")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns 0, or 1 after an error; invalid options exit with status 2."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if bool(options.arch) != bool(options.widths):
        parser.error("precompile needs --arch and --widths together")
    if not (options.arch or options.list or options.clear):
        parser.error("precompile needs --arch and --widths, --list or --clear")
    cache = KernelCache(options.cache)
    try:
        if options.clear:
            print(f"removed {cache.clear()} files from {cache.folder}")
        for architecture in options.arch or ():
            _compile(architecture, options, cache)
        if options.list:
            _list(cache)
    except (CompilerError, OSError) as error:
        print(f"python -m minilm_kernels: error: {error}", file=sys.stderr)
        return 1
    return 0


def _compile(architecture: int, options: argparse.Namespace, cache: KernelCache) -> None:
    teacher = options.teacher_dtype or options.dtype
    wanted = [name for t, s in options.widths for name in kernel_names(t, s, teacher, options.dtype)]
    names = list(dict.fromkeys(wanted))
    done = 0

    def show(kernel: Kernel) -> None:
        nonlocal done
        done += 1
        how = f"{kernel.seconds:.1f} s" if kernel.seconds else "from the cache"
        print(f"sm_{architecture} [{done}/{len(names)}] {kernel.name}: {how}, {len(kernel.code):,} bytes", flush=True)

    compile_kernels(names, architecture, cache=cache, each=show)
    stored = {(entry["name"], entry["requested"]) for entry in cache.entries()}
    lost = [name for name in names if (name, architecture) not in stored]
    if lost:
        raise OSError(f"{len(lost)} of {len(names)} kernels could not be stored in {cache.folder}")


def _list(cache: KernelCache) -> None:
    entries = cache.entries()
    for entry in sorted(entries, key=lambda x: (x["architecture"], x["name"])):
        kind = f"{entry['target']}, NVRTC {entry['nvrtc']}, {entry['bytes']:,} bytes"
        print(f"sm_{entry['architecture']} {entry['name']} {kind}")
    print(f"{len(entries)} kernels, {sum(entry['bytes'] for entry in entries):,} bytes in {cache.folder}")


if __name__ == "__main__":
    sys.exit(main())
