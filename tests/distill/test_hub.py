"""`--push-to-hub` with a stand-in for the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilm_kernels.distill import DistillConfig, distill, hub


class Hub:
    """Records calls; `broken` names a method that fails."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.broken = ""

    def __call__(self) -> Hub:
        return self

    def _call(self, name: str, *details: Any) -> None:
        if name == self.broken:
            raise ConnectionError("no network")
        self.calls.append((name, *details))

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
        self._call("create", name, private, exist_ok)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self._call("upload", repo_id, sorted(path.name for path in folder_path.iterdir()))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(hub, "HfApi", found)
    return found


def test_the_finished_student_is_uploaded(settings: Callable[..., DistillConfig], api: Hub) -> None:
    distill(settings(max_steps=1, push_to_hub=True, hub_model_id="someone/student", hub_private_repo=True))
    create, upload = api.calls
    assert create == ("create", "someone/student", True, True)
    assert upload[1] == "someone/student"
    assert {"README.md", "config.json", "model.safetensors", "settings.json", "tokenizer.json"} <= set(upload[2])


def test_a_missing_login_is_an_error_before_the_first_step(
    settings: Callable[..., DistillConfig], api: Hub, tmp_path: Path
) -> None:
    api.broken = "create"
    with pytest.raises(RuntimeError, match="--push-to-hub: the repository run cannot be created: no network"):
        distill(settings(push_to_hub=True))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_failed_upload_keeps_the_student_and_is_repeated(
    settings: Callable[..., DistillConfig], api: Hub, tmp_path: Path
) -> None:
    api.broken = "upload"
    config = settings(max_steps=1, push_to_hub=True)
    with pytest.raises(RuntimeError, match="its upload failed: no network; the same command with"):
        distill(config)
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    api.broken = ""
    distill(settings(max_steps=1, push_to_hub=True, resume_from_checkpoint=True))
    assert [call[0] for call in api.calls] == ["create", "create", "upload"]


def test_options_of_the_hub_belong_together(settings: Callable[..., DistillConfig]) -> None:
    with pytest.raises(ValueError, match="--hub-model-id belongs to --push-to-hub"):
        settings(hub_model_id="someone/student")
