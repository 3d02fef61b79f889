"""Settings: what is accepted, what is refused and how, and the command line made of them."""

from __future__ import annotations

import itertools
import json
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from minilm_kernels.distill import DistillConfig
from minilm_kernels.distill.cli import build_parser, main
from minilm_kernels.distill.config import default_of, flag, read_settings, show

NEEDED: dict[str, Any] = {"teacher": "t", "output": "o", "copy_layers": (1, 3), "text": ("a.txt",)}


def parse(*words: str) -> DistillConfig:
    return DistillConfig.from_mapping(vars(build_parser().parse_args(words)))


def test_text_and_native_values_mean_the_same() -> None:
    given = DistillConfig(**NEEDED, relations={"qq": 1, "kv": 0.5}, lr=6e-4, betas=(0.9, 0.98), steps=100)
    text = DistillConfig(
        teacher="t", output=Path("o"), copy_layers="1,3", text=["a.txt"],
        relations="qq,kv:0.5", lr="6e-4", betas="0.9,0.98", steps="100",
    )  # fmt: skip
    assert given == text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, "--steps"),
        ({"steps": "many"}, "--steps"),
        ({"steps": True}, "--steps"),
        ({"steps": 1.5}, "--steps"),
        ({"lr": float("nan")}, "--lr"),
        ({"lr": "fast"}, "--lr"),
        ({"betas": (0.9,)}, "--betas"),
        ({"betas": (0.9, 1.0)}, "--betas"),
        ({"dropout": 1.0}, "--dropout"),
        ({"packing": "yes"}, "--packing"),
        ({"method": "minilmv3"}, "minilm, minilmv2"),
        ({"relations": "qx"}, "--relations"),
        ({"relations": "qq,qq:2"}, "--relations"),
        ({"relations": {}}, "--relations"),
        ({"relation_heads": 12, "method": "minilm"}, "--relation-heads"),
        ({"teacher_layer": 0}, "--teacher-layer"),
        ({"prefix_range": (0.8, 0.2)}, "--prefix-range"),
        ({"student": "s"}, "--student and --copy-layers"),
        ({"copy_layers": None}, "none of them"),
        ({"copy_layers": None, "student_layers": 3}, "--student-hidden"),
        ({"text": ()}, "--text or --dataset"),
        ({"dataset": "d"}, "--text or --dataset"),
        ({"warmup_steps": 11, "steps": 10}, "--warmup-steps"),
        ({"accumulation": 3, "batch_size": 8}, "--accumulation"),
        ({"heldout_fraction": 1.0}, "--heldout-fraction"),
        ({"seq_len": 4}, "--seq-len"),
        ({"mask": ["causal"]}, "--mask"),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DistillConfig(**{**NEEDED, **changes})


def test_unknown_options_get_the_closest_names() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'warmup'; did you mean warmup_steps"):
        DistillConfig.from_mapping({**NEEDED, "warmup": 3})
    with pytest.raises(ValueError, match="--help"):
        DistillConfig.from_mapping({**NEEDED, "zzz": 3})
    with pytest.raises(ValueError, match="--teacher is required"):
        DistillConfig.from_mapping({"output": "o"})


def test_schedule_rises_to_the_peak_and_ends_at_zero() -> None:
    config = DistillConfig(**NEEDED, steps=100, warmup_steps=10, lr=2.0)
    rates = [config.learning_rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[100] == 0
    rises = [b - a for a, b in itertools.pairwise(rates)]
    assert rises[:9] == pytest.approx([0.2] * 9)
    assert rises[10:] == pytest.approx([-2 / 90] * 90)
    assert DistillConfig(**NEEDED).warmup == 4000
    assert DistillConfig(**NEEDED, steps=300).warmup == 30
    assert DistillConfig(**NEEDED, steps=3, warmup_steps=3).learning_rate(2) == 6e-4


def test_command_gives_the_settings_back() -> None:
    config = DistillConfig(
        teacher="a teacher",
        output="o",
        text=("a b.txt", "c,d"),
        heldout_text=("e",),
        copy_layers=(-1, 2),
        packing=False,
        relations={"qq": 1.0, "kv": 0.5},
        betas=(0.8, 0.9),
        teacher_layer=-2,
        precision="bfloat16",
        dropout=0.0,
    )
    assert parse(*shlex.split(config.command())[1:]) == config
    assert config.command(2).startswith("torchrun --nproc-per-node 2 -m minilm_kernels.distill ")
    assert DistillConfig.from_mapping(config.as_dict()) == config


def test_help_shows_every_option_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # lines are also broken at hyphens
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in fields(DistillConfig):
        default = default_of(option)
        assert f" {flag(option.name)}" in shown
        assert option.metadata["help"] in shown
        value = "none" if default in (None, ()) else show(default)
        after = shown.split(option.metadata["help"], 1)[1]
        assert after.startswith(" (required)" if default is MISSING else f" (default: {value})")


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_options_from_a_file_yield_to_the_command_line(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"options.{form}"
    yaml = "teacher: missing-folder/t/x\noutput: o\ncopy_layers: [1, 3]\ntext: a.txt\nlr: 6e-5\nseq-len: 64\n"
    options = {**NEEDED, "teacher": "missing-folder/t/x", "lr": 6e-5, "seq-len": 64, "output": str(tmp_path / "o")}
    file.write_text(yaml if form == "yaml" else json.dumps(options))
    config = DistillConfig.from_mapping(read_settings(file))
    assert (config.lr, config.seq_len, config.copy_layers, config.text) == (6e-5, 64, (1, 3), ("a.txt",))

    assert main(["--config", str(file), "--seq-len", "2"]) == 2
    assert "--seq-len must be at least 8, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1", "\x00"])
def test_a_file_without_options_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"options\.yaml"):
        read_settings(file)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_settings(tmp_path / "other.yaml")


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(f"teacher: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'made'}]\n")
    with pytest.raises(ValueError, match="neither YAML nor JSON"):
        read_settings(file)
    assert not (tmp_path / "made").exists()
