"""Settings: what is accepted, what is refused and how, and the command line made of them."""

from __future__ import annotations

import itertools
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
from minilm_kernels.distill.config import LARGEST_SEED, default_of, flag, read_settings, show, shown

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
        ({"relations": "qq:-1"}, "--relations: expected a weight of 0 or more for qq, got -1"),
        ({"relations": "qq:0,kk:0"}, "--relations: expected at least one relation with a weight above 0"),
        ({"relations": "qq:"}, "--relations: expected a number, got ''"),
        ({"relations": ""}, "--relations"),
        ({"relations": 3}, "--relations: expected relations such as qq:1,kk:1,vv:0.5, got 3"),
        ({"relations": [["qq"]]}, "--relations: expected relations"),
        ({"relations": {"qq": True}}, "--relations: expected a number, got True"),
        ({"relations": {1: 1}}, "--relations: expected pairs"),
        ({"relations": "qq:2", "method": "minilm"}, "--relations belongs to --method minilmv2"),
        ({"backend": "cudda"}, "--backend must be one of auto, cuda, triton, cpu, torch, reference, got 'cudda'"),
        ({"backend": None}, "--backend"),
        ({"precision": "float16"}, "--precision"),
        ({"device": "cuda:1"}, "--device"),
        ({"seed": -1}, "--seed must not be negative, got -1"),
        ({"seed": 2**63}, "--seed must be at most 9223372036854775807"),
        ({"seed": 10**5000}, "--seed must be at most .*, got an integer of 16610 bits"),
        ({"seed": "9" * 5000}, "--seed: expected a whole number, got '999"),
        ({"lr": 10**400}, "--lr: expected a number, got an integer of 1329 bits"),
        ({"lr": 1e39}, "--lr: expected a number in the range of float32"),
        ({"eps": 1e-46}, "--eps: expected a number in the range of float32"),
        ({"eps": "1e-400"}, "--eps must be positive"),
        ({"steps": 2**31}, "--steps must be at most 2147483647"),
        ({"steps": 1e3}, "--steps: expected a whole number, got 1000.0"),
        ({"log_every": None}, "--log-every: expected a whole number, got None"),
        ({"seq_len": 2**30}, "--seq-len must be at most 1048576"),
        ({"student_heads": 2**40}, "--student-heads must be at most"),
        ({"copy_layers": None, "student_layers": 10**6, "student_hidden": 8}, "--student-layers must be at most 10000"),
        ({"copy_layers": (1, 10**9)}, "--copy-layers must be at most 10000, got 1000000000"),
        ({"copy_layers": (0, 1)}, "--copy-layers counts from 1 .* got 0,1"),
        ({"copy_layers": ()}, "--copy-layers: expected at least one"),
        ({"student_projections": ("q", "k")}, "--student-projections: expected three names"),
        ({"teacher_projections": ("q", "k", "")}, "--teacher-projections: expected a name, got ''"),
        ({"teacher": ""}, "--teacher: expected a name, got ''"),
        ({"output": " "}, "--output: expected a name, got ' '"),
        ({"text": ("a", "")}, "--text: expected a name, got ''"),
        ({"text": "a\0b"}, "--text: .* without NUL"),
        ({"text": "a\udcffb"}, "--text: expected text that UTF-8 can hold"),
        ({"text_field": ""}, "--text-field: expected a name, got ''"),
        (
            {"output": "~no-such-user/o"},
            r"--output: there is no home folder for '~no-such-user/o'; .* \./~no-such-user/o",
        ),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DistillConfig(**{**NEEDED, **changes})


def _floats() -> list[tuple[str, Callable[[float], Any]]]:
    """Every option that holds floats, and how one value becomes all of it."""
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
    assert {"lr", "eps", "dropout", "betas", "relations"} <= {name for name, _ in _floats()}


def test_sound_values_at_the_bounds_are_taken() -> None:
    config = DistillConfig(
        **NEEDED, seed=LARGEST_SEED, clip=0, weight_decay=0, heldout_fraction=0, dropout=0, betas=(0, 0),
        prefix_range=(0, 1), relations={"qq": 0, "vk": 1}, eps=2.0**-126, checkpoint_every=10**9,
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
    assert set(named) == {"teacher", "output", "student", "dataset", "text", "heldout_text"}
    for name in named:
        several = name in ("text", "heldout_text")
        changes: dict[str, Any] = {name: ["~/a", "b~", "c/~"] if several else "~/a"}
        changes |= {"copy_layers": None} if name == "student" else {"text": ()} if name == "dataset" else {}
        value = getattr(DistillConfig(**{**NEEDED, **changes}), name)
        assert value == ((f"{tmp_path}/a", "b~", "c/~") if several else f"{tmp_path}/a")
    (tmp_path / "c.yaml").write_text("lr: 1\n")
    assert read_settings("~/c.yaml") == {"lr": 1}


def test_both_spellings_of_a_name_are_one_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="settings: 'seq_len' and 'seq-len' are the same option; give it once"):
        DistillConfig.from_mapping({**NEEDED, "seq_len": 64, "seq-len": 64})
    for file, content in {"c.yaml": "seq-len: 64\nseq_len: 64", "c.json": '{"seq-len": 64, "seq_len": 64}'}.items():
        (tmp_path / file).write_text(content)
        with pytest.raises(ValueError, match=rf"--config .*{file}: 'seq-len' and 'seq_len' are the same option"):
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
        "betas": [[1], {}],
        "lr": None,
        "teacher": 3,
        "mask": "x" * 999,
    }
    lines = config.differences(odd)
    assert [line.partition(":")[0] for line in lines] == ["--teacher", "--relations", "--mask", "--lr", "--betas"]
    assert max(map(len, lines)) < 200


def test_aliases_of_yaml_are_read(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("text: &files [a, b]\nheldout_text: *files\n")
    assert read_settings(file) == {"text": ["a", "b"], "heldout_text": ["a", "b"]}


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
        relations={"qq": 1.0, "kv": 0.5, "vv": 1 / 3},
        betas=(0.8, 2 / 3),
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
