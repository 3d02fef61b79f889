"""The public names, and what importing them costs."""

import subprocess
import sys

import pytest

import minilm_kernels as mk

PUBLIC = {
    "QKV", "MiniLMLoss", "MiniLMv2Loss", "QKVExtractor", "available_backends", "relation_kl", "student_config",
}  # fmt: skip


def test_public_names():
    assert set(mk.__all__) == PUBLIC
    for name in PUBLIC:
        assert callable(getattr(mk, name))
    with pytest.raises(AttributeError, match="no attribute 'relation_lk'"):
        _ = mk.relation_lk


def test_losses_do_not_import_transformers():
    code = "import sys, minilm_kernels; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
