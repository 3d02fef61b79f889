"""Damaged and hostile model folders: an error of one sentence, without executing code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from minilm_kernels.distill import DistillConfig
from minilm_kernels.distill.loading import load_model, load_tokenizer, resolve_source
from minilm_kernels.distill.models import TeacherStudent, load_models

from .tiny import make_model

Settings = Callable[..., DistillConfig]
Damage = Callable[[Path], Any]
CPU = torch.device("cpu")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def edited(name: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content.update(changes)
        (folder / name).write_text(json.dumps(content))

    return damage


def settings_of(**changes: Any) -> Damage:
    return edited("config.json", **changes)


def vocabulary(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"].update(changes)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return damage


def written(name: str, content: bytes | str) -> Damage:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str, size: int) -> Damage:
    return lambda folder: os.truncate(folder / name, size)


def without(pattern: str) -> Damage:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def payload(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Payload(folder.parent / "executed")))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    payload(folder, "pytorch_model.bin")


def index(content: Any) -> Damage:
    def damage(folder: Path) -> None:
        shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
        payload(folder, "payload.bin")
        payload(folder, "payload.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def shards(name: str) -> Damage:
    return index({"metadata": {"total_size": 1}, "weight_map": {"embeddings.word_embeddings.weight": name}})


def code(folder: Path) -> None:
    (folder / "payload.py").write_text(f"open({str(folder.parent / 'executed')!r}, 'w')\n")


def model_code(folder: Path) -> None:
    code(folder)
    settings_of(model_type="payload", auto_map={"AutoModel": "payload.M", "AutoConfig": "payload.C"})(folder)


def tokenizer_code(folder: Path) -> None:
    code(folder)
    edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["payload.T", None]}, tokenizer_class="T")(folder)
    without("tokenizer.json")(folder)


DAMAGES: dict[str, tuple[Damage, str]] = {
    # config.json
    "a million layers": (settings_of(num_hidden_layers=10**6), "num_hidden_layers = 1000000"),
    "a trillion layers": (settings_of(num_hidden_layers=10**12), "num_hidden_layers"),
    "some thousand layers": (settings_of(num_hidden_layers=5000), "more than .* (modules|elements)"),
    "layers below 0": (settings_of(num_hidden_layers=-1), "layer"),
    "no layers": (settings_of(num_hidden_layers=0), "layer"),
    "no heads": (settings_of(num_attention_heads=0), "ZeroDivisionError"),
    "heads that do not divide": (settings_of(num_attention_heads=5), "5"),
    "no width": (settings_of(hidden_size=0), "no safetensors model"),
    "endless width": (settings_of(hidden_size=10**9), "more than .* elements"),
    "endless vocabulary": (settings_of(vocab_size=10**12), "more than .* elements"),
    "vocabulary below 0": (settings_of(vocab_size=-5), "no safetensors model"),
    "endless positions": (settings_of(max_position_embeddings=10**9), "more than .* elements"),
    "text for a number": (settings_of(hidden_size="x"), "hidden_size"),
    "null for a number": (settings_of(hidden_size=None), "hidden_size"),
    "another width": (settings_of(intermediate_size=64), r"shapes of its weights .* \[96.*\[64"),
    "a list": (written("config.json", "[1]"), "config.json contains list"),
    "an empty config": (written("config.json", ""), "no tokenizer"),
    "half a config": (written("config.json", "{"), "no tokenizer"),
    "a deep config": (written("config.json", "[" * 50_000 + "]" * 50_000), "recursion"),
    "no text": (written("config.json", b"\xff\xfe"), "utf-8"),
    "an unknown type": (settings_of(model_type="nothing"), "nothing"),
    "an unknown activation": (settings_of(hidden_act="nothing"), "KeyError"),
    "padding beyond the vocabulary": (settings_of(pad_token_id=9999), "AssertionError"),
    "labels of another kind": (settings_of(id2label=7), "no tokenizer"),
    "layers of their own": (settings_of(per_layer_config={"0": {"intermediate_size": 3}}), "per-layer"),
    "attention from the hub": (settings_of(attn_implementation="someone/kernel"), "code on the hub"),
    "quantized": (settings_of(quantization_config={"quant_method": "gptq", "bits": 4}), "no safetensors model"),
    "no config": (without("config.json"), "no safetensors model"),
    # Weights
    "weights outside": (settings_of(transformers_weights="../outside.safetensors"), "outside of the folder"),
    "weights that are an adapter's pickle": (settings_of(transformers_weights="adapter_model.bin"), "no .safetensors"),
    "empty weights": (written("model.safetensors", b""), "SafetensorError"),
    "one byte": (written("model.safetensors", b"\1"), "SafetensorError"),
    "pointer": (written("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer"),
    "cut in the header": (cut("model.safetensors", 1000), "SafetensorError"),
    "half downloaded": (cut("model.safetensors", 150_000), "not fully covered"),
    "an endless header": (written("model.safetensors", struct.pack("<Q", 2**62) + b"{}"), "SafetensorError"),
    "no tensors": (written("model.safetensors", struct.pack("<Q", 2) + b"{}"), "lack 27 tensors.* and 23 more"),
    "a folder": (lambda f: [(f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()], "safetensors"),
    "no weights": (without("*.safetensors"), "it contains no weights"),
    "pickled": (pickled, "only pytorch_model.bin"),
    "an adapter": (written("adapter_config.json", '{"peft_type": "LORA"}'), "merge it"),
    "index outside": (shards("../outside.safetensors"), "outside of the folder"),
    "index at the root": (shards("/outside.safetensors"), "outside of the folder"),
    "index of a pickle": (shards("payload.bin"), "no .safetensors file"),
    "index of a disguised pickle": (shards("payload.safetensors"), "SafetensorError"),
    "index of nothing": (shards("nothing.safetensors"), "nothing.safetensors"),
    "index that is a list": (index([]), "contains list"),
    "index without names": (index({}), "KeyError"),
    # Tokenizer
    "no tokenizer": (without("*token*"), "no tokenizer file"),
    "tokenizer pointer": (written("tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
    "tokenizer of another kind": (vocabulary(type="SomethingNew"), "no tokenizer"),
    "no unknown token": (vocabulary(unk_token="[NONE]"), "Missing"),
    "text for a vocabulary": (vocabulary(vocab="x"), "no tokenizer"),
    "ids below 0": (vocabulary(vocab={"[UNK]": -1}), "no tokenizer"),
    "ids beyond the embedding": (
        vocabulary(vocab={"[UNK]": 10**9, "[PAD]": 0, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}),
        "ids up to 1000000000, .* only 65 rows",
    ),
    "a deep tokenizer": (written("tokenizer.json", "[" * 100_000), "no tokenizer"),
    "an empty tokenizer": (written("tokenizer.json", ""), "no tokenizer"),
    "tokenizer settings as a list": (written("tokenizer_config.json", "[]"), "no tokenizer"),
    # Code
    "code for the model": (model_code, "custom code"),
    "code for the tokenizer": (tokenizer_code, "no tokenizer|tokenizer has 5 tokens|custom code"),
}


@pytest.fixture
def folder(tmp_path: Path, teacher_folder: Path) -> Path:
    """A complete model folder for the test to damage."""
    return Path(shutil.copytree(teacher_folder, tmp_path / "model"))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_hostile_folder_is_one_sentence(name: str, folder: Path, settings: Settings) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_models(settings(teacher=str(folder)), CPU)
    assert "teacher" in str(caught.value)
    assert len(str(caught.value)) < 900
    assert not (folder.parent / "executed").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half downloaded", "--student: no safetensors model"),
        ("no tensors", "--student .* lack 27 tensors"),
        ("some thousand layers", "--student: no safetensors model"),
        ("tokenizer of another kind", "--student: no tokenizer"),
        ("tokenizer pointer", "--student: no tokenizer"),
        ("index of a pickle", "--student: no safetensors model"),
    ],
)
def test_the_student_s_folder_is_held_to_the_same(name: str, message: str, folder: Path, settings: Settings) -> None:
    DAMAGES[name][0](folder)
    with pytest.raises(ValueError, match=message):
        load_models(settings(student=str(folder)), CPU)


def test_a_student_without_a_tokenizer_takes_the_teacher_s(folder: Path, settings: Settings) -> None:
    without("*token*")(folder)
    assert isinstance(load_models(settings(student=str(folder)), CPU), TeacherStudent)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interruption_stays_one(kind: type[BaseException], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise kind

    monkeypatch.setattr("minilm_kernels.distill.loading.AutoTokenizer.from_pretrained", interrupted)
    with pytest.raises(kind):
        load_tokenizer(str(folder), "--teacher")


def test_a_panic_of_the_tokenizer_library_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of Rust panics is not a subclass of Exception."""
    panic = type("PanicException", (BaseException,), {})

    def panicked(*_: Any, **__: Any) -> None:
        raise panic("index out of bounds")

    monkeypatch.setattr("minilm_kernels.distill.loading.AutoTokenizer.from_pretrained", panicked)
    with pytest.raises(ValueError, match=r"--teacher: no tokenizer .*PanicException: index out of bounds"):
        load_tokenizer(str(folder), "--teacher")


def test_what_is_no_model_costs_nothing_afterwards(folder: Path) -> None:
    """The limit on the size of models applies only during loading."""
    settings_of(num_hidden_layers=5000)(folder)
    with pytest.raises(ValueError, match="more than"):
        load_model(str(folder), "--teacher")
    torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(3000)])


def test_a_checkpoint_with_a_head_in_shards_is_accepted(tmp_path: Path, folder: Path, settings: Settings) -> None:
    """The checkpoint of a task model has other names and no pooler, and consists of several files."""
    bert = make_model("bert")
    whole = BertForMaskedLM(bert.config)
    whole.bert.load_state_dict({k: v for k, v in bert.state_dict().items() if not k.startswith("pooler")})
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    models = load_models(settings(teacher=str(folder)), CPU)
    expected = bert.get_submodule("encoder.layer.1.attention.self.query").weight
    assert torch.equal(models.teacher.model.get_submodule("encoder.layer.1.attention.self.query").weight, expected)


def test_the_folder_of_a_run_stands_for_its_student(
    tmp_path: Path, folder: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "before"
    run.mkdir()
    (run / "settings.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"--teacher: .*before is the folder of a run that has not finished its student"
    ):
        resolve_source(str(run), "--teacher")
    folder.rename(run / "student")
    assert resolve_source(str(run), "--teacher") == str(run / "student")
    assert "using its student" in capsys.readouterr().err
    assert load_models(settings(teacher=str(run)), CPU).teacher.extractor.layer == 2


@pytest.mark.parametrize("name", ["./models/x", "/models/x", "~/models/x", "a/b/c", "models/x y", "-a/b", "a..b"])
def test_what_the_hub_cannot_know_fails_at_once(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"--teacher: there is no folder "):
        resolve_source(name, "--teacher")


@pytest.mark.parametrize("name", ["someone/a-model", "a-model"])
def test_the_hub_is_named_before_it_is_asked(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_source(name, "--student") == name
    assert (
        f"--student: there is no folder {name}; looking for a model of this name on the Hugging Face hub"
        in capsys.readouterr().err
    )


def test_names_below_a_prefix_are_explained(folder: Path, settings: Settings) -> None:
    weights = load_file(folder / "model.safetensors")
    for prefix in ("module.", "_orig_mod.", "student.model."):
        save_file({prefix + k: v for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f'lack 27 tensors.*its names begin with "{prefix}"'):
            load_models(settings(teacher=str(folder)), CPU)
