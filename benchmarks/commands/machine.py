"""`python -m benchmarks machine`: versions, devices, backends and tools of this machine."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.measure import records
from minilm_kernels import backend_status

_PACKAGES = ("torch", "triton", "transformers", "numpy", "cuda-bindings", "nvidia-cuda-nvrtc", "pytest", "setuptools")
_TOOLS = ("nvidia-smi", "nvcc", "ncu", "compute-sanitizer", "c++", "g++", "ninja", "git")


def register(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("machine", help="print versions, devices, backends and tools", description=__doc__)
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> None:
    print(f"revision {records.revision()}, Python {platform.python_version()}, {platform.platform()}")
    print(f"{records.device_name('cpu')}, {os.cpu_count()} processors")
    for package in _PACKAGES:
        print(f"{package}: {_version(package)}")
    for name, status in backend_status().items():
        print(f"backend {name}: {status}")
    for tool in _TOOLS:
        print(f"{tool}: {shutil.which(tool) or 'not installed'}")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_properties(0))
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False, timeout=60)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
