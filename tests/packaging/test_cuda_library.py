"""Compiles the CUDA library for all GPUs, warnings being errors, and looks at what came out. No GPU is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import native
import pytest

from .binaries import gpu_code, libraries_named_by, stable_abi, symbols_from_elsewhere
from .environments import ROOT, SECONDS, clean_environ

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.timeout(2 * SECONDS),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found: the CUDA library is not compiled"),
    pytest.mark.skipif(not any(native.CSRC.glob("cuda/*.cu")), reason="there are no sources in csrc/cuda"),
]


@pytest.fixture(scope="module")
def library() -> Path:
    """In build/cuda, where a second run finds it."""
    strict = {"NVCC_APPEND_FLAGS": "-Werror all-warnings -Xcompiler -Werror", "CXXFLAGS": "-Werror"}
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build",
        "--build-base",
        "build/cuda",
        "--build-lib",
        "build/cuda",
    ]
    environ = clean_environ() | strict | {"MINILM_KERNELS_BUILD": "cuda"}
    result = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return ROOT / "build/cuda/minilm_kernels/_cuda.abi3.so"


def test_has_code_for_every_gpu(library):
    assert gpu_code(library) == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"}


def test_needs_the_stable_abi_only(library):
    names = symbols_from_elsewhere(library)
    assert "aoti_torch_library_def" in names
    assert names <= stable_abi()
    assert not {name for name in libraries_named_by(library) if "cuda" in name or "python" in name}


def test_loads_beside_any_torch(library):
    code = (
        f"import torch; torch.ops.load_library({str(library)!r}); "
        "print(*(name for name in torch._C._dispatch_get_all_op_names() if name.startswith('minilm_kernels_cuda::')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()
