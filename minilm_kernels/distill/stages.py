"""The stages of a run with teacher assistants: each distills a model from the one before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .config import DistillConfig
from .run_folder import STUDENT, TOKENS


@dataclass(frozen=True)
class Stage:
    """A part of a run, which trains one model.

    Attributes:
        name: "assistant-1" and so on, then "student"; "" if the run has no assistant.
        config: the settings, with the original teacher. Its `output_dir` is the folder of the stage.
        tokens: folder of the token shards, which is the same for all stages.
        previous: settings of the stage before; `None` if the teacher is the original one.
        steps_before, steps_after: number of steps of all earlier and of all later stages.
    """

    name: str
    config: DistillConfig
    tokens: Path
    previous: DistillConfig | None
    steps_before: int
    steps_after: int

    @property
    def folder(self) -> Path:
        """The folder of the stage."""
        return Path(self.config.output_dir)

    def model_config(self, assistant: Path | None = None) -> DistillConfig:
        """The settings with the teacher of this stage.

        Args:
            assistant: folder to take the assistant from, by default that of the stage before.
        """
        before = self.previous
        if before is None:
            return self.config
        projections = before.student_projections or (before.teacher_projections if before.student is None else None)
        return replace(
            self.config,
            teacher=str(assistant or Path(before.output_dir) / STUDENT),
            teacher_layer=before.student_layer,
            teacher_projections=projections,
            teacher_assistant=(),
            recipe=None,
        )


def stages(config: DistillConfig) -> list[Stage]:
    """The stages of a run: its assistants in folders below `output_dir`, and then the student in `output_dir`."""
    configs = [config]
    while (assistant := configs[0].assistant()) is not None:
        configs.insert(0, assistant)
    names = [*(f"assistant-{number}" for number in range(1, len(configs))), "student" if configs[1:] else ""]
    for index, name in enumerate(names[:-1]):
        configs[index] = replace(configs[index], output_dir=str(Path(config.output_dir) / name))
    tokens = Path(config.output_dir) / TOKENS if config.tokens is None else Path(config.tokens)
    steps = [each.max_steps for each in configs]
    return [
        Stage(name, each, tokens, configs[i - 1] if i else None, sum(steps[:i]), sum(steps[i + 1 :]))
        for i, (name, each) in enumerate(zip(names, configs, strict=True))
    ]
