"""Checks before the first step: weights, tokenizer and text, and saving of the student."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from minilm_kernels.distill import DistillConfig, distill, preflight
from minilm_kernels.distill.models import _with_dropout, load_models
from minilm_kernels.distill.tokenization import DocumentTokenizer
from minilm_kernels.qkv import QKVExtractor

from .tiny import SIZES, WORDS, make_model, make_texts, make_tokenizer, save_model

Settings = Callable[..., DistillConfig]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, teacher_folder: Path) -> Path:
    return Path(shutil.copytree(teacher_folder, tmp_path / "model"))


def change(folder: Path, action: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    action(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def drop(folder: Path, *parts: str) -> None:
    def action(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if any(part in name for part in parts)]:
            del weights[name]

    change(folder, action)


# Weights


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize(
    ("part", "layer"),
    [
        ("embeddings.word_embeddings.weight", 1),
        ("embeddings.LayerNorm.bias", 1),
        ("layer.0.attention.self.value.bias", 1),
        ("layer.0.output.dense.weight", 2),
        ("layer.1.attention.self.query.weight", -1),
    ],
)
def test_what_q_k_v_depend_on_must_be_there(part: str, layer: int, side: str, folder: Path, settings: Settings) -> None:
    drop(folder, part)
    options: dict[str, Any] = {side: str(folder), f"{side}_layer": layer}
    with pytest.raises(ValueError, match=rf"--{side} .*lack 1 tensors .*{part}"):
        load_models(settings(**options), CPU)


@pytest.mark.parametrize(
    ("part", "layer"), [("pooler", 2), ("layer.1.output", 2), ("layer.1", 1), ("layer.0.output", 1)]
)
def test_what_lies_behind_may_be_missing(part: str, layer: int, folder: Path, settings: Settings) -> None:
    drop(folder, part)
    load_models(settings(teacher=str(folder), teacher_layer=layer), CPU)
    load_models(settings(student=str(folder), student_layer=layer), CPU)


def test_layers_that_the_weights_do_not_have(folder: Path, settings: Settings) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"lack \d+ tensors .*layer 4 .*encoder\.layer\.2"):
        load_models(settings(teacher=str(folder)), CPU)
    load_models(settings(teacher=str(folder), teacher_layer=2), CPU)


def test_saved_buffers_count_where_they_are_used() -> None:
    """A buffer before the projections must be loaded. A buffer in the pooler may be missing."""
    model = make_model("bert").eval()
    model.embeddings.LayerNorm.register_buffer("offset", torch.ones(48))
    model.pooler.register_buffer("offset", torch.ones(48))
    model.embeddings.register_buffer("aside", torch.full((2,), math.nan), persistent=False)
    extractor = QKVExtractor(model)
    info = {"missing_keys": {"pooler.offset"}, "unexpected_keys": set()}
    preflight.check_weights(extractor, info, "--teacher", teacher=True)
    info["missing_keys"] = {"embeddings.LayerNorm.offset"}
    with pytest.raises(ValueError, match=r"embeddings\.LayerNorm\.offset"):
        preflight.check_weights(extractor, info, "--teacher", teacher=True)
    model.embeddings.LayerNorm.offset.fill_(math.inf)
    with pytest.raises(ValueError, match=r"LayerNorm\.offset contain NaN"):
        preflight.check_weights(extractor, {"missing_keys": (), "unexpected_keys": ()}, "--teacher", teacher=True)


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(value: float, side: str, folder: Path, settings: Settings) -> None:
    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights["encoder.layer.0.output.dense.weight"][3, 5] = value
        weights["encoder.layer.1.output.dense.weight"][:] = value  # after the projections of the last layer

    change(folder, poison)
    with pytest.raises(ValueError, match=rf"--{side} .*not finite: encoder\.layer\.0\.output\.dense\.weight contain"):
        load_models(settings(**{side: str(folder)}), CPU)
    load_models(settings(**{side: str(folder), f"{side}_layer": 1}), CPU)


def test_a_teacher_that_computes_nan_is_named(folder: Path, settings: Settings) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": math.nan}))
    with pytest.raises(ValueError, match=r"--teacher .* Q, K and V of layer 2 are not"):
        load_models(settings(teacher=str(folder)), CPU)


def test_a_teacher_of_zeros_is_named(folder: Path, settings: Settings) -> None:
    change(folder, lambda weights: weights["encoder.layer.1.attention.self.key.weight"].zero_())
    with pytest.raises(ValueError, match=r"--teacher .*self\.key\.weight are all zero"):
        load_models(settings(teacher=str(folder)), CPU)
    load_models(settings(student=str(folder)), CPU)


# The tokenizer


def one_word(*words: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(list(words))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 1.0])
def test_unknown_words(share: float, settings: Settings, tmp_path: Path) -> None:
    """A few per cent of unknown tokens are normal; more than half mean another language."""
    text = tmp_path / "text.txt"
    known = round(60 * (1 - share))
    words = [f"w{i}" if i < known else f"strange{i}" for i in range(60)]
    text.write_text("\n\n".join([" ".join(words)] * 30))
    config = settings(text=[text], max_steps=1, eval_fraction=0)
    if share < 0.5:
        assert distill(config).student is not None
    else:
        with pytest.raises(
            ValueError, match=rf"--teacher: .* {30 * (60 - known)} of the first 1800 tokens are its unknown"
        ):
            distill(config)
        assert not (tmp_path / "run" / "settings.json").exists()


def check(tokenizer: PreTrainedTokenizerFast, texts: list[str], rows: int = 300) -> None:
    table = AutoModel.from_config(AutoConfig.for_model("bert", **{**SIZES, "vocab_size": rows}, **TINY))
    preflight.check_ids(tokenizer, table, table)
    preflight.check_text(DocumentTokenizer(tokenizer), iter(texts), table, table)


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
PROSE = ["Ein Satz, une phrase, 一句話, предложение 🙂."] * 40


def test_tokenizers_of_bytes_and_characters_know_every_text() -> None:
    whole = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    check(PreTrainedTokenizerFast(tokenizer_object=whole), PROSE)
    letters = [*sorted(set("".join(PROSE)) - {" "}), "a"]
    single = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["?", *dict.fromkeys(letters)])}, unk_token="?"))
    single.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")])
    check(PreTrainedTokenizerFast(tokenizer_object=single, unk_token="?"), PROSE, rows=60)


def test_words_that_are_dropped_are_unknown_too() -> None:
    """BPE without bytes and unknown token returns nothing for unknown letters."""
    dropping = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    check(dropping, ["abba baab"] * 40, rows=3)
    with pytest.raises(ValueError, match="returns 0 tokens for the first 1440 characters"):
        check(dropping, ["привет, мир и все остальные, здравствуйте"] * 40, rows=3)


def test_a_tokenizer_far_smaller_than_the_embedding_is_another_s() -> None:
    check(make_tokenizer(), make_texts(20), rows=258)  # reserved rows, and padding to a round number
    with pytest.raises(ValueError, match="--teacher: its tokenizer has 65 tokens, but its embedding has 259 rows"):
        check(make_tokenizer(), make_texts(20), rows=259)


def test_the_largest_id_counts_and_not_the_number_of_tokens() -> None:
    holes = make_tokenizer()
    holes.add_tokens(["<added>"])  # gets id 65, the first free one
    check(holes, make_texts(20), rows=66)
    with pytest.raises(ValueError, match="ids up to 65, but the teacher's embedding has only 65 rows, 0 to 64"):
        check(holes, make_texts(20), rows=65)
    gap = Tokenizer(models.WordLevel({**{w: i for i, w in enumerate(WORDS)}, "[UNK]": 900}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="ids up to 900, but the teacher's embedding has only 120 rows"):
        check(PreTrainedTokenizerFast(tokenizer_object=gap, unk_token="[UNK]"), make_texts(20), rows=120)


def test_ids_that_only_the_special_tokens_have() -> None:
    """A post-processor may use ids that are not in the vocabulary."""
    tokenizer = make_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [777]
    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="[UNK]")
    with pytest.raises(ValueError, match="returns id 777, but the teacher's embedding has only 65 rows"):
        check(odd, make_texts(20), rows=65)


def test_the_student_s_rows_are_held_to_the_ids_too(folder: Path, settings: Settings) -> None:
    make_model("bert")
    small = AutoModel.from_pretrained(folder)
    small.resize_token_embeddings(60)
    small.save_pretrained(folder)
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match="ids up to 64, but the student's embedding has only 60 rows"):
        load_models(settings(student=str(folder)), CPU)


# Saving


def test_a_student_that_cannot_be_saved_fails_before_training(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("layer_types")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(ValueError, match="the student could not be saved: KeyError: 'layer_types'"):
        distill(settings())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_full_disk_is_named_before_training(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # the message of tokenizers

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    with pytest.raises(OSError, match="the disk is full"):
        distill(settings())


def test_nothing_of_the_trial_stays(settings: Settings, tmp_path: Path) -> None:
    distill(settings(max_steps=1))
    assert not list((tmp_path / "run").glob(".unfinished-*"))


def test_a_student_that_comes_back_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_model("bert"), make_tokenizer()
    preflight.check_saving(model, tokenizer, tmp_path)
    twin = make_model("bert", seed=1)
    monkeypatch.setattr("minilm_kernels.distill.preflight.AutoModel.from_pretrained", lambda *_, **__: twin)
    with pytest.raises(ValueError, match=r"changes when it is saved and loaded: embeddings"):
        preflight.check_saving(model, tokenizer, tmp_path)
    monkeypatch.undo()
    model.config.layer_norm_eps, model.config.to_diff_dict = 0.25, dict  # a config that does not save its settings
    with pytest.raises(ValueError, match=r"could be saved, but not loaded|changes when it is saved"):
        preflight.check_saving(model, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tied_and_transposed_weights_come_back(tmp_path: Path) -> None:
    model = make_model("bert")
    dense = model.encoder.layer[0].intermediate.dense
    dense.weight = torch.nn.Parameter(dense.weight.detach().t().contiguous().t())
    assert not dense.weight.is_contiguous()
    preflight.check_saving(model, make_tokenizer(), tmp_path)
    shape = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 96}
    albert = AutoModel.from_config(AutoConfig.for_model("albert", **SIZES, **shape, embedding_size=16))
    preflight.check_saving(albert, make_tokenizer(), tmp_path)


# Both models


def test_copied_layers_take_the_teacher_s_projections(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shape = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 3}
    config = AutoConfig.for_model("llama", vocab_size=65, max_position_embeddings=40, **shape)
    AutoModel.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    names = [f"layers.{{i}}.self_attn.{letter}_proj" for letter in "qkv"]
    options = {"teacher": folder, "teacher_projections": names, "mask": "causal", "copy_layers": (1, 3)}
    result = distill(settings(**options, max_steps=2))
    assert result.student is not None
    assert len(AutoModel.from_pretrained(result.student).layers) == 2


def test_dropout_reaches_every_name_of_it() -> None:
    shape = {"n_embd": 48, "n_head": 4, "n_layer": 1, "vocab_size": 65, "n_positions": 40}
    for model in (make_model("bert"), AutoModel.from_config(AutoConfig.for_model("gpt2", **shape))):
        changed = _with_dropout(model, 0.3)
        assert {module.p for module in changed.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
        torch.testing.assert_close(changed.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert (model.config.to_dict().get("classifier_dropout"), model.training) == (None, changed.training)
    mamba = AutoModel.from_config(AutoConfig.for_model("mamba", hidden_size=8, num_hidden_layers=1, vocab_size=9))
    with pytest.raises(ValueError, match="--dropout: MambaConfig has no dropout"):
        _with_dropout(mamba, 0.3)


def test_save_model_gives_a_whole_teacher(tmp_path: Path, settings: Settings) -> None:
    for architecture in ("roberta", "mpnet", "distilbert"):
        folder = save_model(tmp_path / architecture, architecture)
        layers = {"teacher": str(folder), "max_seq_length": 30}
        assert load_models(settings(**layers), CPU).teacher.extractor.layer == 2
