"""The package without its optional dependencies: working features, and errors that name the extra to install."""

import subprocess
import sys
import textwrap

import pytest

from minilm_kernels._extras import optional_imports


def run_without(modules: list[str], code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in an interpreter in which the modules cannot be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"
    command = [sys.executable, "-c", blocked + textwrap.dedent(code), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


SLOW = pytest.mark.slow
DISTILL = "from minilm_kernels.distill import distill"
ALL = ["transformers", "safetensors", "tokenizers", "huggingface_hub", "tqdm", "yaml", "datasets", "pyarrow"]
PLAIN_MODEL = """
import torch
from minilm_kernels import MiniLMv2Loss, QKVExtractor

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(24, 24) for _ in range(3))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + torch.softmax(q @ k.mT, -1) @ v

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 24)
        self.layers = torch.nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x

names = [f"layers.{{i}}.{p}" for p in "qkv"]
teacher, student = QKVExtractor(Model(), frozen=True, projections=names), QKVExtractor(Model(), projections=names)
ids = torch.randint(10, (2, 7))
MiniLMv2Loss(num_relation_heads=4)(teacher(input_ids=ids), student(input_ids=ids)).backward()
assert student.model.embedding.weight.grad.abs().sum() > 0
assert student.unused_parameters() == []
"""


def test_losses_and_extractor_need_torch_alone() -> None:
    result = run_without(ALL, PLAIN_MODEL)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        ("transformers", "from minilm_kernels import student_config", 'transformers.*"minilm_kernels[hf]"'),
        ("transformers", "import minilm_kernels.students", 'transformers.*"minilm_kernels[hf]"'),
        *[
            pytest.param(
                module,
                "from minilm_kernels.distill import distill",
                f'{module}.*"minilm_kernels[distill]"',
                marks=marks,
            )
            for module, marks in {"transformers": (), "safetensors": SLOW, "tqdm": SLOW, "tokenizers": SLOW}.items()
        ],
        ("yaml", "import minilm_kernels.distill.config_file", 'yaml.*"minilm_kernels[distill]"'),
        *[
            pytest.param(
                module,
                f"from minilm_kernels.integrations import {name}",
                f'{module}.*"minilm_kernels[{extra}]"',
                marks=SLOW,
            )
            for module, name, extra in [
                ("sentence_transformers", "RelationDistillLoss", "sentence-transformers"),
                ("trl", "RelationDistillationTrainer", "trl"),
            ]
        ],
    ],
)
def test_a_missing_package_is_an_error_that_names_the_extra(module: str, code: str, message: str) -> None:
    result = run_without([module], code)
    package, _, extra = message.partition(".*")
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith("ImportError: minilm_kernels.students" if "[hf]" in extra else "ImportError: ")
    assert f"requires {package}, which is not installed: pip install {extra}" in last


def test_the_command_line_names_the_extra(tmp_path) -> None:
    code = "from minilm_kernels.distill.cli import main; sys.exit(main(sys.argv[1:]))"
    assert run_without(ALL, code, "--help").returncode == 0
    needed = ["--teacher", "t", "--copy-layers", "1", "--text", "t", "--output-dir", str(tmp_path / "o")]
    result = run_without(ALL, code, *needed)
    assert result.returncode == 1
    assert result.stderr.startswith("minilm-distill: error: minilm_kernels.distill requires ")
    assert 'pip install "minilm_kernels[distill]"' in result.stderr
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    result = run_without(ALL, code, *needed, "--config", str(tmp_path / "c.yaml"))
    assert result.returncode == 2
    assert '--config requires yaml, which is not installed: pip install "minilm_kernels[distill]"' in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_outermost_extra_is_named_and_other_errors_pass() -> None:
    with (
        pytest.raises(ImportError, match=r'b requires tqdm, .*"minilm_kernels\[distill\]"'),
        optional_imports("distill", "b"),
        optional_imports("hf", "a"),
    ):
        raise ModuleNotFoundError(name="tqdm")
    with (
        pytest.raises(ImportError, match=r'b requires transformers, .*"minilm_kernels\[distill\]"'),
        optional_imports("distill", "b"),
        optional_imports("hf", "a"),
    ):
        raise ModuleNotFoundError(name="transformers.models")
    with pytest.raises(ModuleNotFoundError, match="another"), optional_imports("hf", "a"):
        raise ModuleNotFoundError("another", name="another")
