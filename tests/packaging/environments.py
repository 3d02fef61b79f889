"""Environments to install into, as a newcomer has them: made, filled and asked in subprocesses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 1200  # of one program: pip fetches gigabytes
# Variables that change what is built, and how.
STEERING = ["MINILM_KERNELS_BUILD", "MAX_JOBS", "CXX", "CXXFLAGS", "LDFLAGS"]

_CHECK = """
import json, sys
import torch, minilm_kernels as mk

torch.manual_seed(0)
teacher, student = torch.randn(2, 70, 3, 8), torch.randn(2, 70, 3, 4)
found = {"python": sys.version.split()[0], "torch": torch.__version__, "file": mk.__file__,
         "status": mk.backend_status()["cpu"], "auto": "cpu" if mk.backend_status()["cpu"] == "ready" else "torch"}
grads = []
for backend in (found["auto"], "reference"):
    x = student.clone().requires_grad_()
    value = mk.relation_kl(teacher, None, x, None, backend=backend)
    value.backward()
    found[backend] = value.item()
    grads.append(x.grad)
found["error"] = ((grads[0] - grads[1]).norm() / grads[1].norm()).item()
print(json.dumps(found))
"""


class Environment:
    """A virtual environment; `shared`: one whose packages it sees, pip too, without this package and build tools."""

    def __init__(self, folder: Path, shared: Environment | None = None, python: str = sys.executable) -> None:
        self.folder = folder
        options = ["--without-pip"] if shared else []
        subprocess.run([python, "-m", "venv", *options, str(folder)], check=True, env=clean_environ(), timeout=SECONDS)
        self.python = folder / "bin" / "python"
        self.site = Path(self.run("import sysconfig; print(sysconfig.get_path('platlib'))").strip())
        if shared is not None:
            own = ("minilm_kernels", "setuptools", "_distutils", "distutils", "pkg_resources", "ninja", "__")
            for entry in shared.site.iterdir():
                if not entry.name.startswith(own):
                    (self.site / entry.name).symlink_to(entry)

    def run(self, code: str, **environ: str) -> str:
        """Of a program that must succeed: what it prints."""
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
        """Imports the installed package and computes a small relation; how exactly is the concern of tests/relation."""
        found = json.loads(self.run(_CHECK, PYTHONWARNINGS="ignore").splitlines()[-1])
        assert Path(found["file"]).is_relative_to(self.folder)
        assert (found["status"] == "ready") == cpu, found["status"]
        assert abs(found[found["auto"]] / found["reference"] - 1) < 1e-6
        assert found["error"] < 1e-5
        return found


def clean_environ() -> dict[str, str]:
    """The surrounding variables less those that steer Python or the build; pip does not byte-compile, to save time."""
    dropped = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", *STEERING}
    return {key: value for key, value in os.environ.items() if key not in dropped} | {"PIP_COMPILE": "0"}


def checkout(folder: Path) -> Path:
    """A copy of the sources as git would hand them out, changes that are not committed included."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def interpreter(version: str) -> str | None:
    """Another Python of this machine, pyenv's included."""
    found = shutil.which(f"python{version}")
    if found is None:
        return None
    code = "import ensurepip, sys; print(sys.executable)"
    environ = os.environ | {"PYENV_VERSION": version}
    result = subprocess.run([found, "-c", code], env=environ, capture_output=True, text=True, check=False, timeout=60)
    return result.stdout.strip() if result.returncode == 0 else None
