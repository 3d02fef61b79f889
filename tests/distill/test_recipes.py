"""Recipes: published settings, overridden options, their storage, and a run of each on a small stand-in."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from minilm_kernels.distill import DistillConfig, distill
from minilm_kernels.distill.cli import build_parser, main
from minilm_kernels.distill.config_file import read_settings
from minilm_kernels.distill.recipes import recipe_options
from minilm_kernels.distill.run_folder import SETTINGS
from minilm_kernels.distill.stages import stages
from minilm_kernels.presets import PRESETS, Preset

from .tiny import ROBERTA, SIZES, make_texts, make_tokenizer

NEEDED: dict[str, Any] = {"teacher": "t", "text": "a.txt", "output_dir": "o"}
ASSISTED = "minilm-l6-h384-xlm-roberta-base"


def config_of(recipe: str, **options: Any) -> DistillConfig:
    return DistillConfig.from_mapping({"recipe": recipe, **NEEDED, **options})


def parse(*words: str) -> DistillConfig:
    return DistillConfig.from_mapping(vars(build_parser().parse_args(words)))


def settings_of(config: DistillConfig) -> tuple[Any, ...]:
    """The settings that differ between recipes."""
    sizes = (config.student_num_hidden_layers, config.student_hidden_size, config.student_num_attention_heads)
    return (
        *(config.method, *sizes, config.relation_heads, config.teacher_layer, config.total_batch_size),
        *(config.learning_rate, config.max_steps, config.adam_betas),
    )


def published(preset: Preset) -> tuple[Any, ...]:
    v1 = preset.method == "minilm"
    layer = preset.teacher_layer if preset.teacher_layer < preset.teacher_layers else -1
    trained = (preset.total_batch_size, preset.learning_rate, preset.max_steps, preset.adam_betas)
    if trained == (None,) * 4:
        trained = (256, 6e-4, 400_000, (0.9, 0.999))  # the defaults
    sizes = (preset.num_hidden_layers, preset.hidden_size, 12)
    return (preset.method, *sizes, None if v1 else preset.relation_heads, layer, *trained)


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_has_the_published_settings(name: str) -> None:
    """`PRESETS` is compared with the papers in test_students.py."""
    preset, config = PRESETS[name], config_of(name)
    stages = [config] if (assistant := config.assistant()) is None else [assistant, config]
    presets = [preset] if preset.assistant is None else [PRESETS[preset.assistant], preset]
    assert [settings_of(stage) for stage in stages] == [published(each) for each in presets]
    for stage in stages:
        assert (stage.warmup, stage.dropout, stage.weight_decay, stage.adam_epsilon) == (4000, 0.1, 0.01, 1e-6)
        assert (stage.max_seq_length, stage.relations) == (512, {"qq": 1.0, "kk": 1.0, "vv": 1.0})
    hub = recipe_options(name).get("teacher")
    assert hub == preset.teacher_hub
    assert (hub is None) == (preset.teacher == "in-house-base")
    assert DistillConfig.from_mapping(json.loads(json.dumps(config.as_dict()))) == config
    assert parse(*shlex.split(config.command())[1:]) == config
    assert f"--recipe={name}" in config.command()
    assert len(config.command()) < 150  # options of the recipe are not repeated


def test_the_teacher_of_a_recipe_may_be_left_out() -> None:
    config = DistillConfig.from_mapping({"recipe": "minilmv2-l6-h384-bert-large", "text": "a.txt", "output_dir": "o"})
    assert config.teacher == "google-bert/bert-large-uncased"
    with pytest.raises(ValueError, match="--teacher is required"):
        DistillConfig.from_mapping({"recipe": "minilm-l12-h384-in-house-base", "text": "a.txt", "output_dir": "o"})


@pytest.mark.parametrize(
    ("given", "student", "assistant"),
    [
        ({}, {"max_steps": 400_000, "total_batch_size": 512}, {"max_steps": 1_000_000, "total_batch_size": 256}),
        ({"max_steps": 400_000}, {"max_steps": 400_000}, {"max_steps": 400_000, "learning_rate": 3e-4}),
        ({"max_steps": 7}, {"max_steps": 7}, {"max_steps": 7, "student_hidden_size": 384}),
        ({"student_hidden_size": 192}, {"student_hidden_size": 192}, {"student_hidden_size": 384}),
        ({"teacher_assistant": "none", "dropout": "none"}, {"teacher_assistant": (), "dropout": None}, None),
        ({"teacher_assistant": "9x48"}, {}, {"student_num_hidden_layers": 9, "max_steps": 400_000}),
        (
            {"copy_layers": "2,4"},
            {"student_num_hidden_layers": None, "copy_layers": (2, 4)},
            {"student_num_hidden_layers": 12, "copy_layers": None},
        ),
        (
            {"teacher_assistant": ["11x36", {"copy_layers": [1, 2], "max_steps": 5, "adam_betas": [0.8, 0.9]}]},
            {"adam_betas": (0.9, 0.999)},
            {"copy_layers": (1, 2), "max_steps": 5, "adam_betas": (0.8, 0.9), "student_hidden_size": None},
        ),
    ],
)
def test_any_option_of_a_recipe_can_be_overridden(
    given: dict[str, Any], student: dict[str, Any], assistant: dict[str, Any] | None
) -> None:
    config = config_of(ASSISTED, **given)
    assert {name: getattr(config, name) for name in student} == student
    found = config.assistant()
    assert (found is None) == (assistant is None)
    if found is not None and assistant is not None:
        assert {name: getattr(found, name) for name in assistant} == assistant
    assert parse(*shlex.split(config.command())[1:]) == config
    assert DistillConfig.from_mapping(json.loads(json.dumps(config.as_dict()))) == config


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "minilm"}, r"--recipe 'minilm': no such recipe; .*--recipe list.*minilmv2-l6-h384-bert-base"),
        ({"recipe": ["list"]}, "--recipe"),
        ({"teacher_assistant": "12"}, "--teacher-assistant: expected layers x hidden size, such as 12x384"),
        ({"teacher_assistant": "12x384x2"}, "--teacher-assistant: expected layers x hidden size"),
        ({"teacher_assistant": "[1, "}, "--teacher-assistant: expected JSON"),
        ({"teacher_assistant": 5}, "--teacher-assistant: expected layers x hidden size"),
        ({"teacher_assistant": "0x384"}, "--teacher-assistant: --student-num-hidden-layers must be positive"),
        ({"teacher_assistant": [{"max_steps": 5}]}, "--teacher-assistant: give exactly one of"),
        ({"teacher_assistant": [{"teacher": "x"}]}, "option 'teacher' is an option of the whole run"),
        ({"teacher_assistant": [{"max_step": 5}]}, "option 'max_step' is unknown; did you mean max_steps"),
        ({"teacher_assistant": ["x", {"max_steps": "many"}]}, "--teacher-assistant: expected layers x hidden size"),
        ({"teacher_assistant": [{"max_steps": "many"}]}, "--max-steps: expected a whole number"),
        ({"teacher_assistant": [{"total_batch_size": 0, "copy_layers": 1}]}, "--teacher-assistant: --total-batch-size"),
    ],
)
def test_a_wrong_recipe_or_assistant_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DistillConfig.from_mapping({**NEEDED, "student_num_hidden_layers": 1, "student_hidden_size": 24, **options})


def test_the_settings_file_of_the_documentation_is_a_chain(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "students.md").read_text(encoding="utf-8")
    block = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "settings.yaml").write_text(block, encoding="utf-8")
    chain = stages(DistillConfig.from_mapping(read_settings(tmp_path / "settings.yaml")))
    configs = [stage.config for stage in chain]
    sizes = [(each.student_num_hidden_layers, each.student_hidden_size, each.max_steps) for each in configs]
    assert sizes == [(24, 768, 200_000), (12, 384, 400_000), (3, 384, 400_000)]


def test_list_prints_every_recipe_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head, rule, *rows = [line.strip("| ").split("|") for line in lines if line.startswith("|")]
    assert len(head) == len(rule)
    table = [dict(zip(map(str.strip, head), map(str.strip, row), strict=True)) for row in rows]
    assert [row["recipe"] for row in table] == list(PRESETS)
    assert table[list(PRESETS).index(ASSISTED)] == {
        "recipe": ASSISTED, "teacher": "FacebookAI/xlm-roberta-base", "layer": "12 of 12", "student": "6x384",
        "heads": "12", "assistant": "12x384", "batch": "512", "rate": "0.0006", "steps": "400000", "beta2": "0.999",
        "scores": "XNLI 68.0, MLQA 53.7", "params": "107M", "speed": "5.3x",
    }  # fmt: skip
    assert table[-1]["batch"] == table[-1]["steps"] == "-"  # not published


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Preset], Path]:
    """A teacher with the layers and heads of a published one, and a small hidden size."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(preset: Preset) -> Path:
        heads = preset.teacher_hidden_size // 64
        hidden = 64 if heads == 16 else 48
        key = (preset.family, preset.teacher_layers, heads)
        if key not in made:
            sizes = {"num_hidden_layers": preset.teacher_layers, "num_attention_heads": heads, "hidden_size": hidden}
            others = ROBERTA if "roberta" in preset.family else {}
            torch.manual_seed(0)
            shape = AutoConfig.for_model(preset.family, intermediate_size=2 * hidden, **SIZES, **sizes, **others)
            made[key] = tmp_path_factory.mktemp("teacher")
            AutoModel.from_config(shape).save_pretrained(made[key])
            make_tokenizer().save_pretrained(made[key])
        return made[key]

    return make


QUICK = ("minilm-l3-h384-bert-base", "minilmv2-l6-h384-bert-base")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
)
def test_every_recipe_starts(
    name: str,
    stand_in: Callable[[Preset], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    preset = PRESETS[name]
    hidden = {12: 24, 48: 48, 64: 192}[preset.relation_heads]  # a multiple of heads and relation heads
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts(8, longest=12)))
    config = DistillConfig.from_mapping(
        {
            "recipe": name,
            "teacher": stand_in(preset),
            "text": tmp_path / "text.txt",
            "output_dir": tmp_path / "run",
            "student_hidden_size": hidden,
            **({} if preset.assistant is None else {"teacher_assistant": f"{preset.teacher_layers}x{hidden}"}),
            **{"max_steps": 1, "total_batch_size": 1, "max_seq_length": 16, "eval_fraction": 0, "device": "cpu"},
        }
    )
    result = distill(config)
    assert result.student is not None
    student = AutoConfig.from_pretrained(result.student)
    assert (student.model_type, student.num_hidden_layers, student.num_attention_heads, student.intermediate_size) == (
        *(preset.family, preset.num_hidden_layers, 12, 4 * hidden),
    )
    said = capsys.readouterr().err
    assert f"minilm-distill: recipe {name}: --method {preset.method} " in said
    assert "; overridden by " in said
    assert f"--student-hidden-size {hidden}" in said
    for folder in (tmp_path / "run", result.student):
        stored = json.loads((folder / SETTINGS).read_text())
        assert stored["recipe"] == name
        assert stored["learning_rate"] == (preset.learning_rate or 6e-4)
    if preset.assistant is not None:
        assistant = AutoConfig.from_pretrained(tmp_path / "run" / "assistant-1" / "student")
        assert (assistant.num_hidden_layers, assistant.hidden_size) == (preset.teacher_layers, hidden)
