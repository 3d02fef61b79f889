"""Virtual environments to install the package into, and the sources to install."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOSS_CHECK = Path(__file__).with_name("loss_check.py")
SECONDS = 1200  # limit of one program; pip may fetch gigabytes
# Environment variables that change the build.
BUILD_VARIABLES = ["MINILM_KERNELS_BUILD", "MAX_JOBS", "CXX", "CXXFLAGS", "LDFLAGS"]


class Environment:
    """A virtual environment.

    Args:
        folder: folder of the new environment.
        shared: another environment whose packages, including pip, are linked into this one. This package, the build
            tools, and the packages whose names begin with one of `without` are left out.
        python: the interpreter that creates the environment.
    """

    def __init__(
        self,
        folder: Path,
        shared: Environment | None = None,
        python: str = sys.executable,
        without: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        options = ["--without-pip"] if shared else []
        subprocess.run([python, "-m", "venv", *options, str(folder)], check=True, env=clean_environ(), timeout=SECONDS)
        self.python = folder / "bin" / "python"
        self.site = Path(self.run("import sysconfig; print(sysconfig.get_path('platlib'))").strip())
        if shared is not None:
            build_tools = ("setuptools", "_distutils", "distutils", "pkg_resources", "ninja")
            omitted = ("minilm_kernels", "__", *build_tools, *without)
            for entry in shared.site.iterdir():
                if not entry.name.startswith(omitted):
                    (self.site / entry.name).symlink_to(entry)

    def run(self, code: str, **environ: str) -> str:
        """Runs a program that must succeed; returns what it prints."""
        result = self.attempt(["-c", code], **environ)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def attempt(self, arguments: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=self.folder,
            env=clean_environ() | environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )

    def pip(self, *arguments: str, **environ: str) -> str:
        result = self.attempt_pip(*arguments, **environ)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def attempt_pip(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return self.attempt(["-m", "pip", *arguments], **environ)

    def check(self, cpu: bool = True) -> dict[str, str]:
        """Computes a loss with the installed package, which must (not) have the CPU library, as `cpu` says.

        Returns the output of loss_check.py.
        """
        result = self.attempt([str(LOSS_CHECK)], PYTHONWARNINGS="ignore")
        assert result.returncode == 0, result.stdout + result.stderr
        found = json.loads(result.stdout.splitlines()[-1])
        assert Path(found["file"]).is_relative_to(self.folder)
        assert (found["status"] == "ready") == cpu, found["status"]
        return found


def clean_environ() -> dict[str, str]:
    """The environment variables without those that change Python or the build. Byte-compiling by pip is turned off."""
    dropped = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", *BUILD_VARIABLES}
    return {key: value for key, value in os.environ.items() if key not in dropped} | {"PIP_COMPILE": "0"}


def checkout(folder: Path) -> Path:
    """Copies the files that git tracks or would add, with their uncommitted changes."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def interpreter(version: str) -> str | None:
    """The interpreter of another Python version on this machine, also one of pyenv; None if there is none."""
    found = shutil.which(f"python{version}")
    if found is None:
        return None
    code = "import ensurepip, sys; print(sys.executable)"
    environ = os.environ | {"PYENV_VERSION": version}
    result = subprocess.run([found, "-c", code], env=environ, capture_output=True, text=True, check=False, timeout=600)
    return result.stdout.strip() if result.returncode == 0 else None
