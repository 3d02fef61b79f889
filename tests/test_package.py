"""The public names, and what importing them costs."""

import subprocess
import sys

import pytest

import minilm_kernels as mk

PUBLIC = {
    "QKV", "MiniLMLoss", "MiniLMv2Loss", "QKVExtractor", "backend_status", "relation_kl", "student_config",
}  # fmt: skip


def test_public_names():
    assert set(mk.__all__) == PUBLIC
    for name in PUBLIC:
        assert callable(getattr(mk, name))
    with pytest.raises(AttributeError, match="no attribute 'relation_lk'"):
        _ = mk.relation_lk


def test_names_can_be_completed():
    assert set(dir(mk)) >= PUBLIC


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("import minilm_kernels", "torch"),
        ("import minilm_kernels.distill.cli", "torch"),
        ("from minilm_kernels import MiniLMLoss, relation_kl", "transformers"),
    ],
)
def test_importing_is_as_cheap_as_it_can_be(code, missing):
    code = f"import sys; {code}; sys.exit({missing!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize(
    "code",
    [
        "import torch, minilm_kernels; torch.ops.minilm_kernels.relation_kl",  # what torch.export.load looks up
        "import minilm_kernels as mk, torch; mk.losses.MiniLMLoss; torch.ops.minilm_kernels.relation_kl",
    ],
)
def test_names_and_operators_are_there_when_they_are_used(code):
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_first_use_of_a_name_inside_a_compiled_function():
    code = """
import minilm_kernels as mk
import torch

@torch.compile(fullgraph=True, backend="eager")
def loss(teacher, student):
    return mk.relation_kl(teacher, None, student, None)

loss(torch.randn(2, 9, 4, 8), torch.randn(2, 9, 4, 8, requires_grad=True)).backward()
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
