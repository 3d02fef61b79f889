"""`python -m tests.mutants [WORDS] [--jobs N]`: applies each mutant and prints whether a test found it.

Each job works in a copy of the working tree. The tests of all mutants have to pass on the unchanged copy. Then each
mutant is applied in turn, and its tests have to fail. Exit status 1: a mutant survived although it is not declared
harmless. Exit status 2: the list does not fit the sources, or a test fails without a mutant.
"""

from __future__ import annotations

import argparse
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import Mutant, devices, distillation, models, native, package, relations, trainers

ROOT = Path(__file__).parents[2]
_LISTS = (relations, models, trainers, distillation, native, devices, package)
MUTANTS: list[Mutant] = [mutant for module in _LISTS for mutant in module.MUTANTS]
SECONDS = 600  # limit for the tests of a mutant; a mutant that exceeds it counts as found
_CPU_LIBRARY = Path("minilm_kernels/_cpu.abi3.so")
_CPU_SOURCES = ("csrc/cpu/", "csrc/common/")
_BUILD = f"from pathlib import Path; import native; native.build('cpu', Path('{_CPU_LIBRARY}'), Path('build/mutants'))"
_FAILED, _INTERRUPTED = 1, 2  # pytest's exit status: a test failed; a module could not be imported


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument(
        "words", nargs="*", help="apply only mutants with one of these words in the file, the text or the title"
    )
    parser.add_argument("--jobs", type=int, default=2, help="number of mutants that are tested in parallel")
    parser.add_argument(
        "--list", action="store_true", help="print the mutants, check that they apply, and test nothing"
    )
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.words or any(w in f"{m.name} {m.old}" for w in options.words)]
    errors = [error for mutant in chosen if (error := misfit(mutant))]
    if errors or not chosen:
        print(*(errors or ["no mutant has these words"]), sep="\n")
        return 2
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name}\n    {mutant.why}{f' [harmless: {mutant.harmless}]' if mutant.harmless else ''}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        return run(chosen, Path(folder), max(1, options.jobs))


def misfit(mutant: Mutant) -> str:
    """The reason why a mutant cannot be applied to the current sources; empty if it can."""
    file = ROOT / mutant.file
    found = file.read_text(encoding="utf-8").count(mutant.old) if file.exists() else -1
    if found == 1 and mutant.old != mutant.new:
        return ""
    reason = "there is no such file" if found < 0 else f"its text occurs {found} times, expected once"
    return f"{mutant.file}: {reason}; bring this mutant up to date:\n    {mutant.old!r}"


class Copy:
    """A copy of the working tree in which mutants are applied."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
        libraries = [str(path.relative_to(ROOT)) for path in ROOT.glob("minilm_kernels/*.so")]
        for name in filter(None, [*names.split("\0"), *libraries]):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self._library_is_right = False  # the CPU library has been built from sources without a mutant

    def build(self) -> str:
        """Compiles the CPU library; returns the compiler's message if it fails."""
        environment = self._environment() | {"CXXFLAGS": "-O1", "MAX_JOBS": "1"}
        result = self._run([sys.executable, "-c", _BUILD], environment)
        return "" if result.returncode == 0 else result.stdout

    def test(self, mutant: Mutant, applied: bool) -> tuple[bool, str]:
        """Runs the mutant's tests with or without the mutant; returns whether they pass, and the first failure.

        Raises:
            RuntimeError: nothing was tested, because the sources do not compile or pytest found no test.
        """
        target = self.folder / mutant.file
        text = target.read_text(encoding="utf-8")
        compiled = mutant.file.startswith(_CPU_SOURCES)
        try:
            if applied:
                target.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            if compiled or not self._library_is_right:
                if message := self.build():
                    raise RuntimeError(f"the sources do not compile:\n{message[-2000:]}")
                self._library_is_right = not (compiled and applied)
            return self._verdict(mutant)
        finally:
            target.write_text(text, encoding="utf-8")

    def _verdict(self, mutant: Mutant) -> tuple[bool, str]:
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not gpu and not packaging"]
        environment = self._environment()
        if "triton" in mutant.file:
            environment |= {"TRITON_INTERPRET": "1", "MINILM_KERNELS_TEST_BACKENDS": "triton"}
        try:
            result = self._run([*command, *shlex.split(mutant.tests)], environment)
        except subprocess.TimeoutExpired:
            return False, f"no end in {SECONDS} s"
        lines = result.stdout.splitlines()
        said = next((line.partition(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))), "")
        if result.returncode == 0:
            return True, lines[-1]
        if result.returncode in (_FAILED, _INTERRUPTED) or result.returncode < 0 or result.returncode > 128:
            return False, said or f"the process ended with status {result.returncode}"
        raise RuntimeError(f"pytest ran no test:\n{result.stdout[-2000:]}")

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.folder), str(self.folder / "build_support")])
        # Python could use a stale .pyc file, because it compares only the size and the time in seconds.
        return os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}

    def _run(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip


def run(mutants: Sequence[Mutant], folder: Path, jobs: int) -> int:
    """Runs the tests without and with each mutant; prints their results and the survivors. Returns the exit status."""
    began = time.monotonic()
    copies = [Copy(folder / str(number)) for number in range(jobs)]
    kinds = {(mutant.tests, "triton" in mutant.file): mutant for mutant in mutants}
    print(f"{len(mutants)} mutants; first their tests without any", flush=True)
    broken = []

    def without(copy: Copy, mutant: Mutant) -> None:
        passed, said = copy.test(mutant, applied=False)
        print(f"{'passes' if passed else 'FAILS'} without a mutant: {mutant.tests}", flush=True)
        if not passed:
            broken.append(f"{mutant.tests}: fails without a mutant: {said}")

    broken += _share(copies, list(kinds.values()), without)
    if broken:
        print(*broken, sep="\n")
        return 2

    survivors: list[Mutant] = []
    found_harmless: list[Mutant] = []

    def applied(copy: Copy, mutant: Mutant) -> None:
        survived, said = copy.test(mutant, applied=True)
        if survived:
            survivors.append(mutant)
        elif mutant.harmless:
            found_harmless.append(mutant)
        print(f"{'survived' if survived else 'found   '}  {mutant.name}  ({said})", flush=True)

    # Mutants of the CPU library come first, so that consecutive builds reuse object files.
    broken = _share(copies, sorted(mutants, key=lambda mutant: not mutant.file.startswith(_CPU_SOURCES)), applied)
    print(*broken, sep="\n", end="\n" if broken else "")
    unexplained = [mutant for mutant in survivors if not mutant.harmless]
    for mutant in survivors:
        print(f"survivor: {mutant.name}\n    {mutant.harmless or f'UNEXPLAINED: {mutant.why}'}")
    for mutant in found_harmless:
        print(f"declared harmless, but found: {mutant.name}")
    used = sum(os.times()[:4])
    print(
        f"{len(mutants)} mutants, {len(mutants) - len(survivors) - len(broken)} found, {len(survivors)} survived, "
        f"{len(unexplained)} of them unexplained; {used:.0f} s of processor, {time.monotonic() - began:.0f} s"
    )
    return 2 if broken else int(bool(unexplained))


def _share(copies: Sequence[Copy], mutants: Sequence[Mutant], work: Callable[[Copy, Mutant], None]) -> list[str]:
    """Calls `work` for all mutants, with one thread for each copy; returns the errors."""
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in mutants:
        waiting.put(mutant)
    errors: list[str] = []

    def serve(copy: Copy) -> None:
        while True:
            try:
                mutant = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                work(copy, mutant)
            except Exception as error:
                errors.append(f"{mutant.name}: {error}")

    threads = [threading.Thread(target=serve, args=(copy,), daemon=True) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS * len(mutants))
    return errors


if __name__ == "__main__":
    raise SystemExit(main())
