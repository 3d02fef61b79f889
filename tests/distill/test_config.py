"""Settings: accepted and refused values, settings files, and the generated command line."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from minilm_kernels._choices import BACKENDS
from minilm_kernels.distill import DistillConfig
from minilm_kernels.distill.cli import build_parser, main
from minilm_kernels.distill.config import LARGEST_SEED
from minilm_kernels.distill.config_file import read_settings
from minilm_kernels.distill.config_values import default_of, flag, show, shown

NEEDED: dict[str, Any] = {"teacher": "t", "output_dir": "o", "copy_layers": (1, 3), "text": ("a.txt",)}


def parse(*words: str) -> DistillConfig:
    return DistillConfig.from_mapping(vars(build_parser().parse_args(words)))


def test_text_and_native_values_mean_the_same() -> None:
    given = DistillConfig(
        **NEEDED, relations={"qq": 1, "kv": 0.5}, learning_rate=6e-4, adam_betas=(0.9, 0.98), max_steps=100
    )
    text = DistillConfig(
        teacher="t", output_dir=Path("o"), copy_layers="1,3", text=["a.txt"],
        relations="qq,kv:0.5", learning_rate="6e-4", adam_betas="0.9,0.98", max_steps="100",
    )  # fmt: skip
    assert given == text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_steps": 0}, "--max-steps"),
        ({"max_steps": "many"}, "--max-steps"),
        ({"max_steps": True}, "--max-steps"),
        ({"max_steps": 1.5}, "--max-steps"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"learning_rate": "fast"}, "--learning-rate"),
        ({"adam_betas": (0.9,)}, "--adam-betas"),
        ({"adam_betas": (0.9, 1.0)}, "--adam-betas"),
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
        ({"copy_layers": None, "student_num_hidden_layers": 3}, "--student-hidden-size"),
        ({"text": ()}, "exactly one of --text"),
        ({"dataset_name": "d"}, "exactly one of --text"),
        ({"warmup_steps": 11, "max_steps": 10}, "--warmup-steps"),
        ({"gradient_accumulation_steps": 3, "total_batch_size": 8}, "--gradient-accumulation-steps"),
        ({"micro_batch_size": 0}, "--micro-batch-size must be positive"),
        ({"micro_batch_size": "none"}, "--micro-batch-size: expected a whole number"),
        ({"max_steps": "none"}, "--max-steps: expected a whole number"),
        ({"bf16": "none"}, "--bf16: expected true or false"),
        ({"teacher_dtype": "float16"}, "--teacher-dtype must be one of float32, bfloat16"),
        ({"eval_fraction": 1.0}, "--eval-fraction"),
        ({"max_seq_length": 4}, "--max-seq-length"),
        ({"mask": ["causal"]}, "--mask"),
        ({"relations": "qq:-1"}, "--relations: expected a weight of 0 or more for qq, got -1"),
        ({"relations": "qq:0,kk:0"}, "--relations: expected at least one relation with a weight above 0"),
        ({"relations": "qq:"}, "--relations: expected a number, got ''"),
        ({"relations": ""}, "--relations"),
        ({"relations": 3}, "--relations: expected relations such as qq:1,kk:1,vv:0.5, got 3"),
        ({"relations": [["qq"]]}, "--relations: expected relations"),
        ({"relations": {"qq": True}}, "--relations: expected a number, got True"),
        ({"relations": {1: 1}}, "--relations: expected relations of"),
        ({"relations": "qq:2", "method": "minilm"}, "--relations belongs to --method minilmv2"),
        ({"backend": "cudda"}, "--backend must be one of auto, cuda, triton, cpu, torch, reference, got 'cudda'"),
        ({"backend": None}, "--backend"),
        ({"bf16": "float16"}, "--bf16"),
        ({"device": "cuda:1"}, "--device"),
        ({"seed": -1}, "--seed must not be negative, got -1"),
        ({"seed": 2**63}, "--seed must be at most 9223372036854775807"),
        ({"seed": 10**5000}, "--seed must be at most .*, got an integer of 16610 bits"),
        ({"seed": "9" * 5000}, "--seed: expected a whole number, got '999"),
        ({"learning_rate": 10**400}, "--learning-rate: expected a number, got an integer of 1329 bits"),
        ({"learning_rate": 1e39}, "--learning-rate: expected a number in the range of float32"),
        ({"adam_epsilon": 1e-46}, "--adam-epsilon: expected a number in the range of float32"),
        ({"adam_epsilon": "1e-400"}, "--adam-epsilon must be positive"),
        ({"max_steps": 2**31}, "--max-steps must be at most 2147483647"),
        ({"max_steps": 1e3}, "--max-steps: expected a whole number, got 1000.0"),
        ({"logging_steps": None}, "--logging-steps: expected a whole number, got None"),
        ({"max_seq_length": 2**30}, "--max-seq-length must be at most 1048576"),
        ({"student_num_attention_heads": 2**40}, "--student-num-attention-heads must be at most"),
        (
            {"copy_layers": None, "student_num_hidden_layers": 10**6, "student_hidden_size": 8},
            "--student-num-hidden-layers must be at most 10000",
        ),
        ({"copy_layers": (1, 10**9)}, "--copy-layers must be at most 10000, got 1000000000"),
        ({"copy_layers": (0, 1)}, "--copy-layers counts from 1 .* got 0,1"),
        ({"copy_layers": ()}, "--copy-layers: expected at least one"),
        ({"student_projections": ("q", "k")}, "--student-projections: expected three names"),
        ({"teacher_projections": ("q", "k", "")}, "--teacher-projections: expected a name, got ''"),
        ({"teacher": ""}, "--teacher: expected a name, got ''"),
        ({"output_dir": " "}, "--output-dir: expected a name, got ' '"),
        ({"text": ("a", "")}, "--text: expected a name, got ''"),
        ({"text": "a\0b"}, "--text: .* without NUL"),
        ({"text": "a\udcffb"}, "--text: expected text that UTF-8 can encode"),
        ({"text_column": ""}, "--text-column: expected a name, got ''"),
        (
            {"output_dir": "~no-such-user/o"},
            r"--output-dir: there is no home folder for '~no-such-user/o'; .* \./~no-such-user/o",
        ),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DistillConfig(**{**NEEDED, **changes})


def _floats() -> list[tuple[str, Callable[[float], Any]]]:
    """Every option with floats, and a function that creates its value from one float."""
    found: list[tuple[str, Callable[[float], Any]]] = []
    for name, hint in get_type_hints(DistillConfig).items():
        if hint is dict or get_origin(hint) is dict:
            found.append((name, lambda value: {"qq": value}))
        elif get_origin(hint) is tuple and float in get_args(hint):
            found += [(name, lambda value: (0.5, value)), (name, lambda value: (value, 0.5))]
        elif hint is float or float in get_args(hint):
            found.append((name, lambda value: value))
    return found


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("name", "make"), _floats())
def test_every_float_is_finite(name: str, make: Callable[[float], Any], value: float, text: bool) -> None:
    given = make(value)
    with pytest.raises(ValueError, match=f"{flag(name)}: expected a finite number, got {value}"):
        DistillConfig(**{**NEEDED, name: show(given) if text else given})


def test_there_are_floats_of_every_kind() -> None:
    assert {"learning_rate", "adam_epsilon", "dropout", "adam_betas", "relations"} <= {name for name, _ in _floats()}


def test_sound_values_at_the_bounds_are_taken() -> None:
    config = DistillConfig(
        **NEEDED, seed=LARGEST_SEED, max_grad_norm=0, weight_decay=0, eval_fraction=0, dropout=0, adam_betas=(0, 0),
        prefix_range=(0, 1), relations={"qq": 0, "vk": 1}, adam_epsilon=2.0**-126, save_steps=10**9,
    )  # fmt: skip
    assert config.relations == {"qq": 0.0, "vk": 1.0}
    torch.manual_seed(config.seed)
    np.random.default_rng((config.seed, 1))


def test_backends_have_one_source() -> None:
    from minilm_kernels import backend_status

    assert list(backend_status()) == list(BACKENDS)
    for backend in BACKENDS:
        assert DistillConfig(**NEEDED, backend=backend).backend == backend


def test_home_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    named = [option.name for option in fields(DistillConfig) if option.metadata["path"]]
    paths = {"teacher", "output_dir", "student", "dataset_name", "tokens", "text", "eval_text", "cache_teacher"}
    assert set(named) == paths
    for name in named:
        several = name in ("text", "eval_text")
        changes: dict[str, Any] = {name: ["~/a", "b~", "c/~"] if several else "~/a"}
        changes |= (
            {"copy_layers": None} if name == "student" else {"text": ()} if name in ("dataset_name", "tokens") else {}
        )
        value = getattr(DistillConfig(**{**NEEDED, **changes}), name)
        assert value == ((f"{tmp_path}/a", "b~", "c/~") if several else f"{tmp_path}/a")
    (tmp_path / "c.yaml").write_text("learning_rate: 1\n")
    assert read_settings("~/c.yaml") == {"learning_rate": 1}


def test_both_spellings_of_a_name_are_one_option(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="settings: 'max_seq_length' and 'max-seq-length' are the same option; give it once"
    ):
        DistillConfig.from_mapping({**NEEDED, "max_seq_length": 64, "max-seq-length": 64})
    for file, content in {
        "c.yaml": "max-seq-length: 64\nmax_seq_length: 64",
        "c.json": '{"max-seq-length": 64, "max_seq_length": 64}',
    }.items():
        (tmp_path / file).write_text(content)
        with pytest.raises(
            ValueError, match=rf"--config .*{file}: 'max-seq-length' and 'max_seq_length' are the same option"
        ):
            read_settings(tmp_path / file)


def test_values_in_messages_are_short() -> None:
    value: Any = ["x" * 1000]
    for _ in range(40):
        value = [value] * 10
    for odd in (value, {"a": value}, "x" * 10**6, 10**5000, -(10**5000), [10**5000], b"x" * 10**6, set(range(10**5))):
        assert len(shown(odd)) <= 100
    assert shown("text") == "'text'"
    assert shown([1, 2]) == "[1, 2]"


def test_settings_of_another_run_are_shown_whatever_they_are() -> None:
    config = DistillConfig(**NEEDED)
    odd = {
        **config.as_dict(),
        "relations": {"qq": "x"},
        "adam_betas": [[1], {}],
        "learning_rate": None,
        "teacher": 3,
        "mask": "x" * 999,
    }
    lines = config.differences(odd)
    assert [line.partition(":")[0] for line in lines] == [
        "--teacher",
        "--relations",
        "--mask",
        "--learning-rate",
        "--adam-betas",
    ]
    assert max(map(len, lines)) < 200


def test_aliases_of_yaml_are_read(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("text: &files [a, b]\neval_text: *files\n")
    assert read_settings(file) == {"text": ["a", "b"], "eval_text": ["a", "b"]}


def test_unknown_options_get_the_closest_names() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'warmup'; did you mean warmup_steps"):
        DistillConfig.from_mapping({**NEEDED, "warmup": 3})
    with pytest.raises(ValueError, match="--help"):
        DistillConfig.from_mapping({**NEEDED, "zzz": 3})
    with pytest.raises(ValueError, match="--teacher is required"):
        DistillConfig.from_mapping({"output_dir": "o"})


def test_command_gives_the_settings_back() -> None:
    config = DistillConfig(
        teacher="a teacher",
        output_dir="o",
        text=("a b.txt", "c,d"),
        eval_text=("e",),
        copy_layers=(-1, 2),
        packing=False,
        relations={"qq": 1.0, "kv": 0.5, "vv": 1 / 3},
        adam_betas=(0.8, 2 / 3),
        teacher_layer=-2,
        bf16=True,
        dropout=0.0,
    )
    assert parse(*shlex.split(config.command())[1:]) == config
    assert config.command(2).startswith("torchrun --nproc-per-node 2 -m minilm_kernels.distill ")
    assert DistillConfig.from_mapping(config.as_dict()) == config


def test_help_shows_every_option_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # otherwise lines are wrapped, also at hyphens
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in fields(DistillConfig):
        default = default_of(option)
        assert f" {flag(option.name)}" in shown
        assert option.metadata["help"] in shown
        value = option.metadata["absent"] if default in (None, ()) else show(default)
        after = shown.split(option.metadata["help"], 1)[1]
        assert after.startswith(" (required)" if default is MISSING else f" (default: {value})")


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_options_from_a_file_yield_to_the_command_line(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"options.{form}"
    yaml = "teacher: missing-folder/t/x\noutput_dir: o\ncopy_layers: [1, 3]\ntext: a.txt\n"
    yaml += "learning_rate: 6e-5\nmax-seq-length: 64\n"
    options = {
        **NEEDED,
        "teacher": "missing-folder/t/x",
        "learning_rate": 6e-5,
        "max-seq-length": 64,
        "output_dir": str(tmp_path / "o"),
    }
    file.write_text(yaml if form == "yaml" else json.dumps(options))
    config = DistillConfig.from_mapping(read_settings(file))
    assert (config.learning_rate, config.max_seq_length, config.copy_layers, config.text) == (
        6e-5,
        64,
        (1, 3),
        ("a.txt",),
    )

    assert main(["--config", str(file), "--max-seq-length", "2"]) == 2
    assert "--max-seq-length must be at least 8, got 2" in capsys.readouterr().err


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
