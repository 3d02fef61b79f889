"""`--push-to-hub`: the finished student on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from .config import DistillConfig
from .console import say


def prepare(config: DistillConfig) -> None:
    """Creates the repository before any training, so that a missing login or permission is an error at once.

    Raises:
        RuntimeError: the hub cannot be reached or refuses.
    """
    try:
        HfApi().create_repo(config.hub_name, private=config.hub_private_repo, exist_ok=True)
    except Exception as error:
        raise RuntimeError(
            f"--push-to-hub: the repository {config.hub_name} cannot be created: {error}; log in with `hf auth login`"
        ) from error


def push(config: DistillConfig, student: Path) -> None:
    """Uploads the folder of the student in one commit.

    Raises:
        RuntimeError: the upload failed. The student remains in its folder.
    """
    try:
        HfApi().upload_folder(repo_id=config.hub_name, folder_path=student, commit_message="Distilled student")
    except Exception as error:
        raise RuntimeError(
            f"--push-to-hub: the student is in {student}, but its upload failed: {error}; the same command with "
            "--resume-from-checkpoint uploads it again"
        ) from error
    say(f"uploaded the student to {config.hub_name}")
