"""The public names, the cost of importing them, and the warning about a source tree that hides an installation."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minilm_kernels as mk

PUBLIC = {
    "PRESETS", "QKV", "MiniLMLoss", "MiniLMv2Loss", "Preset", "QKVExtractor", "backend_status", "copied_student",
    "pca_student", "prefix_mask", "preset_config", "random_student", "record_qkv", "relation_kl", "relation_kl_multi",
    "SelfRelationLoss", "student_config", "TrimmedVocabulary", "trim_vocabulary",
}  # fmt: skip


def test_public_names():
    assert set(mk.__all__) == PUBLIC
    for name in PUBLIC - {"PRESETS"}:
        assert callable(getattr(mk, name))
    assert len(mk.PRESETS) > 1
    assert all(isinstance(preset, mk.Preset) for preset in mk.PRESETS.values())
    with pytest.raises(AttributeError, match="no attribute 'relation_lk'"):
        _ = mk.relation_lk


def test_completion_offers_the_public_names_and_no_others():
    _ = mk.relation_kl, mk.losses
    assert dir(mk) == sorted(PUBLIC)


def test_the_version_stands_in_one_place():
    """pyproject.toml reads the version from the package, so that a source tree without installation has one, too."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", mk.__version__)
    for file in ("pyproject.toml", "CITATION.cff", "setup.py"):
        assert mk.__version__ not in Path(__file__).parents[1].joinpath(file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("import minilm_kernels; dir(minilm_kernels); minilm_kernels.__version__", "torch"),
        ("import minilm_kernels.distill.cli", "torch"),
        ("from minilm_kernels import MiniLMLoss, backend_status, relation_kl, relation_kl_multi", "transformers"),
        ("import torch, minilm_kernels", "transformers"),
    ],
)
def test_importing_is_as_cheap_as_it_can_be(code, missing):
    code = f"import sys; {code}; sys.exit({missing!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=600).returncode == 0


@pytest.mark.parametrize(
    "code",
    [
        "import torch, minilm_kernels; torch.ops.minilm_kernels.relation_kl",  # torch.export.load looks it up
        "import minilm_kernels as mk, torch; mk.losses.MiniLMLoss; torch.ops.minilm_kernels.relation_kl",
    ],
)
def test_names_and_operators_are_there_when_they_are_used(code):
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=600).returncode == 0


@pytest.mark.slow
def test_first_use_of_a_name_inside_a_compiled_function():
    code = """
import minilm_kernels as mk
import torch

@torch.compile(fullgraph=True, backend="eager")
def loss(teacher, student):
    return mk.relation_kl(teacher, None, student, None)

loss(torch.randn(2, 9, 4, 8), torch.randn(2, 9, 4, 8, requires_grad=True)).backward()
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=600).returncode == 0


class TestSourceTree:
    """A source tree and a folder of installed packages. Each of them may contain the package."""

    @pytest.fixture
    def tree(self, tmp_path) -> Path:
        return self._copy_package(tmp_path / "a source tree")

    @pytest.fixture
    def site(self, tmp_path) -> Path:
        (tmp_path / "site-packages").mkdir()
        return tmp_path / "site-packages"

    def test_a_hidden_installation_is_named(self, tree, site):
        self._install(site)
        (warning,) = self._warnings(tree, site)
        assert f"is imported from the source tree {tree}, not from the installation in {site}." in warning
        assert f"pip install -e {tree}" in warning
        assert warning.startswith("<string>:1: UserWarning: ")  # the warning points to the import statement
        assert self._warnings(tree, site, "") == [warning]  # PYTHONPATH=site-packages does not ask for a source tree

    def test_a_hidden_editable_installation_of_another_tree_is_named(self, tree, site, tmp_path):
        self._install(site, url=(tmp_path / "another tree").as_uri())
        (warning,) = self._warnings(tree, site)
        assert f"not from the installation in {tmp_path / 'another tree'}." in warning

    def test_an_editable_installation_of_the_tree_is_not_hidden(self, tree, site, tmp_path):
        (tmp_path / "link").symlink_to(tree)
        for folder in (tree, tmp_path / "link"):
            self._install(site, url=folder.as_uri())
            assert self._warnings(tree, site) == []
            assert self._warnings(tmp_path / "link", site) == []

    @pytest.mark.parametrize("content", ["", "{}", '{"url": "file:///x", "dir_info": {}}', "[]"])
    def test_an_installation_of_unknown_origin_is_named(self, tree, site, content):
        self._install(site)
        (site / "minilm_kernels-9.9.9.dist-info/direct_url.json").write_text(content, encoding="utf-8")
        (warning,) = self._warnings(tree, site)
        assert f"not from the installation in {site}." in warning

    def test_without_an_installation(self, tree, site):
        assert self._warnings(tree, site) == []

    def test_a_tree_that_was_asked_for(self, tree, site):
        self._install(site)
        assert self._warnings(site.parent, tree, site) == []
        assert self._warnings(tree, tree, site) == []

    def test_an_installation_that_is_imported(self, site):
        self._install(site)
        self._copy_package(site)
        (site / "pyproject.toml").unlink()
        assert self._warnings(site.parent, site) == []

    @staticmethod
    def _copy_package(folder: Path) -> Path:
        source = Path(mk.__file__).parent
        (folder / "minilm_kernels").mkdir(parents=True)
        for name in ("__init__.py", "_source_tree.py"):
            shutil.copy2(source / name, folder / "minilm_kernels" / name)
        (folder / "pyproject.toml").touch()
        return folder

    @staticmethod
    def _install(site: Path, url: str | None = None) -> None:
        """Writes the metadata of an installation, which is editable if `url` is given."""
        metadata = site / "minilm_kernels-9.9.9.dist-info"
        metadata.mkdir(exist_ok=True)
        if url is not None:
            origin = {"url": url, "dir_info": {"editable": True}}
            (metadata / "direct_url.json").write_text(json.dumps(origin), encoding="utf-8")

    @staticmethod
    def _warnings(folder: Path, *path: Path | str) -> list[str]:
        """The warnings of a Python process in `folder`, with `path` as its only packages."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        result = subprocess.run(
            [sys.executable, "-S", "-c", "import minilm_kernels, minilm_kernels as again; print(again.__version__)"],
            cwd=folder,
            env=environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == mk.__version__
        # From Python 3.13 on, an indented line shows the source.
        return [line for line in result.stderr.splitlines() if line and not line.startswith(" ")]
