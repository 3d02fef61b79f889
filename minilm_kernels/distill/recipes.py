"""Recipes: the settings of the published students as options of `minilm-distill`. This module does not import torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from minilm_kernels.presets import PRESETS, Preset

from .config_values import flag, show, shown

if TYPE_CHECKING:
    from .config import DistillConfig

_SIZES = ("student_num_hidden_layers", "student_hidden_size")


def recipe_options(name: Any, given: Collection[str] = ()) -> dict[str, Any]:
    """The options of a recipe. Settings that all recipes share are the defaults of `DistillConfig`.

    Args:
        name: a key of `PRESETS`.
        given: names of options that the user has given. They also apply to the recipe's teacher assistant, and
            `student` and `copy_layers` replace the recipe's student.

    Raises:
        ValueError: there is no such recipe. The message lists the names.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(
            f"--recipe {shown(name)}: no such recipe; minilm-distill --recipe list describes them: {', '.join(PRESETS)}"
        )
    preset = PRESETS[name]
    options = _options(preset)
    if preset.assistant is not None:
        options["teacher_assistant"] = (
            {
                option: value
                for option, value in _options(PRESETS[preset.assistant]).items()
                if option in _SIZES or (value != options[option] and option not in given)
            },
        )
    if preset.teacher_hub is not None:
        options["teacher"] = preset.teacher_hub
    if {"student", "copy_layers"} & set(given):
        options = {option: value for option, value in options.items() if option not in _SIZES}
    return options


def _options(preset: Preset) -> dict[str, Any]:
    options = {
        "method": preset.method,
        "student_num_hidden_layers": preset.num_hidden_layers,
        "student_hidden_size": preset.hidden_size,
        "dropout": 0.1,
        "teacher_layer": preset.teacher_layer if preset.teacher_layer < preset.teacher_layers else -1,
        "relation_heads": preset.relation_heads if preset.method == "minilmv2" else None,
        "total_batch_size": preset.total_batch_size,
        "learning_rate": preset.learning_rate,
        "max_steps": preset.max_steps,
        "adam_betas": preset.adam_betas,
    }
    return {option: value for option, value in options.items() if value is not None}


def recipe_summary(config: DistillConfig) -> str:
    """The recipe of a run with its options, and those that the run overrides, as one line."""
    options = recipe_options(config.recipe)
    listed = " ".join(f"{flag(name)} {show(value)}" for name, value in options.items())
    changed = [name for name, value in options.items() if getattr(config, name) != value]
    overridden = " ".join(f"{flag(name)} {show(getattr(config, name))}" for name in changed)
    return f"recipe {config.recipe}: {listed}" + (f"; overridden by {overridden}" if changed else "")


def recipe_table() -> str:
    """All recipes as a Markdown table in columns of equal width, for `--recipe list`."""
    head = "recipe|teacher|layer|student|heads|assistant|batch|rate|steps|beta2|scores|params|speed"
    rows = [head.split("|")]
    for name, preset in PRESETS.items():
        assistant = None if preset.assistant is None else _size(PRESETS[preset.assistant])
        beta2 = None if preset.adam_betas is None else preset.adam_betas[1]
        cells = [
            name,
            preset.teacher_hub or "not published",
            f"{preset.teacher_layer} of {preset.teacher_layers}",
            _size(preset),
            preset.relation_heads,
            assistant,
            *(preset.total_batch_size, preset.learning_rate, preset.max_steps, beta2),
            ", ".join(f"{task} {score}" for task, score in preset.scores.items()) or None,
            f"{preset.million_parameters}M",
            f"{preset.speedup}x",
        ]
        rows.append(["-" if cell is None else show(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    table = "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)
    return (
        f"{table}\n\n"
        "heads: relation heads, which for MiniLM are the attention heads; all students have 12 attention heads.\n"
        "rate: peak learning rate. scores: as published; SQuAD 2.0 and MLQA are F1. speed: of inference, against 12\n"
        "layers of hidden size 768. -: none, or not published; training uses the defaults of minilm-distill then."
    )


def _size(preset: Preset) -> str:
    return f"{preset.num_hidden_layers}x{preset.hidden_size}"
