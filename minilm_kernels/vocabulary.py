"""Vocabulary trimming: a student's tokenizer with a part of the teacher's tokens, and the rows of its embedding."""

import copy
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from minilm_kernels._extras import optional_imports

with optional_imports("hf", "minilm_kernels.vocabulary"):
    from tokenizers import pre_tokenizers
    from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TrimmedVocabulary", "trim_vocabulary"]

_CHUNK = 256  # texts that are tokenized at once


@dataclass(frozen=True, eq=False)
class TrimmedVocabulary:
    """The vocabulary of a student that has a part of the teacher's tokens, in the same order.

    Attributes:
        tokenizer: the student's tokenizer.
        teacher_ids: the teacher's id of each token of the student, (student's tokens,) int64, ascending. These are the
            rows of the teacher's embedding.
        student_ids: the student's id of each of the teacher's ids, (teacher's ids,) int64. Dropped tokens have the id
            of the student's unknown token; without one, that of its padding token or end of text.

    Example:
        >>> import torch
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
        >>> from minilm_kernels import trim_vocabulary
        >>> words = {"[UNK]": 0, "kernel": 1, "Kern": 2, "loss": 3}
        >>> backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
        >>> trimmed = trim_vocabulary(tokenizer, ["kernel loss"])
        >>> trimmed.teacher_ids.tolist(), trimmed.student_ids.tolist()
        ([0, 1, 3], [0, 1, 0, 2])
        >>> model = BertModel(BertConfig(vocab_size=4, num_hidden_layers=1, hidden_size=24, intermediate_size=48))
        >>> trimmed.trim(model).get_input_embeddings().weight.shape
        torch.Size([3, 24])
    """

    tokenizer: Any
    teacher_ids: torch.Tensor
    student_ids: torch.Tensor

    def summary(self, teacher_tokenizer: Any) -> str:
        """One sentence with the sizes of both vocabularies, without its full stop."""
        return f"The student has {len(self.teacher_ids)} of the teacher's {len(teacher_tokenizer)} tokens"

    def trim(self, model: PreTrainedModel) -> PreTrainedModel:
        """Creates the base model that has only the rows of its word embedding that belong to kept tokens.

        Args:
            model: a model with the teacher's vocabulary. It is not changed.

        Returns:
            A model of the same class and dtype, on the CPU. Its config has the new size and ids of special tokens.

        Raises:
            TypeError: `model` is not a transformers model.
            ValueError: the model's vocabulary is smaller than the teacher's, another of its tensors depends on the
                vocabulary, or its positions depend on the id of the padding token, and this id changes.
        """
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
        base: Any = model.base_model
        words = base.get_input_embeddings().weight
        if words.shape[0] <= int(self.teacher_ids[-1]):
            raise ValueError(
                f"model: its word embedding has {words.shape[0]} rows, but the vocabulary has ids up to "
                f"{int(self.teacher_ids[-1])}"
            )
        config = copy.deepcopy(base.config)
        config.vocab_size = len(self.teacher_ids)
        for name, value in base.config.to_dict().items():
            if name.endswith("_token_id"):
                translated = self._translated(value)
                if translated is not None or name == "pad_token_id":  # some configs refuse None for the others
                    setattr(config, name, translated)
        rows = self.teacher_ids.to(words.device)
        state = {
            name: tensor[rows] if tensor.data_ptr() == words.data_ptr() and tensor.shape == words.shape else tensor
            for name, tensor in base.state_dict().items()
        }
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            student = AutoModel.from_config(config, dtype=base.dtype)
        try:
            student.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"model: a tensor of {type(base).__name__} depends on the vocabulary in another way than its word "
                f"embedding: {' '.join(str(error).split())[:300]}"
            ) from error
        old = dict(base.named_modules())
        for name, module in student.named_modules():
            if isinstance(module, torch.nn.Embedding) and module is not student.get_input_embeddings():
                before = getattr(old.get(name), "padding_idx", None)
                if before is not None and module.padding_idx != before:
                    raise ValueError(
                        f"model: the rows of {name} begin after the id of the padding token, which changes from "
                        f"{before} to {module.padding_idx}"
                    )
        return student

    def _translated(self, value: Any) -> Any:
        """The student's id, or ids, of a special token in the config of a model; None for an id that no token has."""
        if isinstance(value, (list, tuple)):
            return [self._translated(entry) for entry in value]
        if not isinstance(value, int) or value < 0:
            return value
        return int(self.student_ids[value]) if value < len(self.student_ids) else None


def trim_vocabulary(
    tokenizer: Any, texts: Iterable[str] | Mapping[int, int] | None = None, size: int | None = None
) -> TrimmedVocabulary:
    """Creates the tokenizer of a student with a part of the teacher's tokens.

    The kept tokens are those of `texts` or, with `size`, the most frequent of them. Without `texts`, they are the
    tokens with the lowest ids. Further tokens are always kept: special and added tokens, and those that the kept ones
    need, which are the parts of a BPE merge, the bytes of a byte-level tokenizer, and in WordPiece and Unigram the
    single characters of the kept tokens.

    A text that has only kept tokens, and no unknown ones, is divided into the same tokens by both tokenizers. The
    student's tokenizer divides other words into shorter tokens, where the teacher's has used a dropped token.
    Distillation needs no second division: `student_ids[teacher's ids]` are the student's inputs, token by token.

    Args:
        tokenizer: the teacher's tokenizer, with the backend of the library tokenizers. WordPiece, BPE, Unigram and
            WordLevel are supported.
        texts: texts whose tokens are kept, or a mapping from the ids of these tokens to how often they occur.
        size: largest number of tokens of the student, including those that are always kept.

    Returns:
        The student's tokenizer, and the ids of both vocabularies.

    Raises:
        TypeError: `texts` is a single text, or `size` is not an integer.
        ValueError: neither `texts` nor `size` is given; `size` is smaller than the number of tokens that are always
            kept; or the tokenizer has another backend or model, no token for dropped tokens, or changes when it is
            saved and loaded.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from minilm_kernels import trim_vocabulary
        >>> pieces = {"[UNK]": 0, "low": 1, "##er": 2, "##est": 3, "l": 4, "##o": 5, "##w": 6, "##e": 7, "##r": 8}
        >>> backend = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
        >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
        >>> trimmed = trim_vocabulary(tokenizer, ["lower"])
        >>> trimmed.tokenizer.tokenize("lower"), trimmed.tokenizer.tokenize("lowest")
        (['low', '##er'], ['[UNK]'])
        >>> len(trimmed.tokenizer)
        8
    """
    if isinstance(texts, str):
        raise TypeError("texts: expected several texts, got one str")
    if texts is None and size is None:
        raise ValueError("texts, size: give at least one of them")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
        raise TypeError(f"size: expected an int, got {size!r}")
    content = _content(tokenizer)
    ids = tokenizer.get_vocab()
    if texts is None:
        candidates: Iterable[int] = sorted(ids.values())
    else:
        counts = texts if isinstance(texts, Mapping) else _counts(tokenizer, texts)
        candidates = sorted(counts, key=lambda token: (-counts[token], token))
    needed = _needed(content["model"], ids)
    kept: set[int] = set()
    for token in _always(tokenizer, content, ids):
        kept |= _closure(token, needed, kept)
    if size is not None and len(kept) > size:
        raise ValueError(
            f"size={size}: the tokenizer has {len(kept)} special tokens, bytes and others that are always kept"
        )
    for token in candidates:
        if size is not None and len(kept) >= size:
            break
        added = _closure(token, needed, kept)
        if size is None or len(kept) + len(added) <= size:
            kept |= added
    return restricted(tokenizer, torch.tensor(sorted(kept)))


def restricted(tokenizer: Any, teacher_ids: torch.Tensor) -> TrimmedVocabulary:
    """The vocabulary that keeps the tokens `teacher_ids`, ascending, as a `trim_vocabulary` has selected them.

    Raises:
        ValueError: a token that is always kept is missing; see also `trim_vocabulary`.
    """
    content = _content(tokenizer)
    ids = {old: new for new, old in enumerate(teacher_ids.tolist())}
    if missing := _always(tokenizer, content, tokenizer.get_vocab()) - ids.keys():
        raise ValueError(
            f"teacher_ids: special tokens are missing ({sorted(missing)[:3]}): the tokenizer is another one"
        )
    vocabulary = {token: ids[old] for token, old in tokenizer.get_vocab().items() if old in ids}
    student = _reloaded(tokenizer, _renumbered(content, ids), ids)
    if student.get_vocab() != vocabulary:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} with fewer tokens changes when it is saved and loaded, so its "
            "vocabulary cannot be trimmed"
        )
    stand_in = next(
        (ids[i] for name in ("unk", "pad", "eos") if (i := getattr(tokenizer, f"{name}_token_id")) in ids), None
    )
    if stand_in is None:
        raise ValueError("tokenizer: it has no unknown, padding or end token, which would replace dropped tokens")
    student_ids = torch.full((max(tokenizer.get_vocab().values()) + 1,), stand_in)
    student_ids[teacher_ids] = torch.arange(len(teacher_ids))
    return TrimmedVocabulary(student, teacher_ids, student_ids)


def _content(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or backend is None:
        raise ValueError(
            f"tokenizer: expected a tokenizer of transformers with the backend of the library tokenizers, got "
            f"{type(tokenizer).__name__}"
        )
    content = json.loads(backend.to_str())
    kind = content["model"]["type"]
    if kind not in ("WordPiece", "BPE", "Unigram", "WordLevel"):
        raise ValueError(f"tokenizer: its model is {kind}, expected WordPiece, BPE, Unigram or WordLevel")
    return content


def _counts(tokenizer: Any, texts: Iterable[str]) -> Counter[int]:
    counts: Counter[int] = Counter()
    iterator = iter(texts)
    while chunk := list(islice(iterator, _CHUNK)):
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for tokens in encoded["input_ids"]:
            counts.update(tokens)
    return counts


def _needed(model: Mapping[str, Any], ids: Mapping[str, int]) -> Callable[[int], Iterable[int]]:
    """A function from the id of a token to the ids of the tokens that must be kept with it."""
    tokens = {i: token for token, i in ids.items()}
    if model["type"] == "BPE":
        # A word that the teacher divides into kept tokens is built by merges whose results are parts of them. If these
        # are kept, too, each merge of the teacher is the first possible one of the student.
        parts: dict[int, set[int]] = defaultdict(set)
        for left, right, merged in _merges(model):
            if merged in ids and left in ids and right in ids:
                parts[ids[merged]] |= {ids[left], ids[right]}
        return lambda token: parts.get(token, ())
    if model["type"] == "WordLevel":
        return lambda token: ()
    prefix = model.get("continuing_subword_prefix", "")

    def characters(token: int) -> Iterator[int]:
        word = tokens[token].removeprefix(prefix) if prefix else tokens[token]
        return (ids[name] for c in set(word) for name in (c, prefix + c) if name in ids)

    return characters


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The merges of a BPE model as (left, right, result)."""
    prefix = len(model.get("continuing_subword_prefix") or "")
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right, left + right[prefix:]


def _always(tokenizer: Any, content: Mapping[str, Any], ids: Mapping[str, int]) -> set[int]:
    """The ids of the tokens that are kept in any case."""
    model = content["model"]
    kept = {token["id"] for token in content["added_tokens"]} | set(tokenizer.all_special_ids)
    if content["post_processor"]:
        kept |= _post_processor_ids(content["post_processor"])
    if model["type"] == "Unigram":
        # Its score determines the score of unknown characters, and so the division of texts that contain them.
        scores = [score for _, score in model["vocab"]]
        kept.add(scores.index(min(scores)))
        if model.get("unk_id") is not None:
            kept.add(model["unk_id"])
    names = [model.get("unk_token")]
    if model.get("byte_fallback"):
        names += [f"<0x{byte:02X}>" for byte in range(256)]
    if '"ByteLevel"' in json.dumps([content["pre_tokenizer"], content["decoder"]]):
        names += pre_tokenizers.ByteLevel.alphabet()
    return kept | {ids[name] for name in names if name in ids}


def _closure(token: int, needed: Callable[[int], Iterable[int]], kept: set[int]) -> set[int]:
    """The token and all that it needs, without those in `kept`, which has all that its tokens need."""
    found: set[int] = set()
    pending = [token]
    while pending:
        token = pending.pop()
        if token not in kept and token not in found:
            found.add(token)
            pending += needed(token)
    return found


def _renumbered(content: dict[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """A tokenizer.json with only the tokens `ids`, a mapping from old to new ids."""
    content = copy.deepcopy(content)
    model = content["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in ids]
        if model.get("unk_id") is not None:
            model["unk_id"] = ids[model["unk_id"]]
    else:
        model["vocab"] = {token: ids[i] for token, i in model["vocab"].items() if i in ids}
    if model["type"] == "BPE":
        vocabulary = model["vocab"]
        model["merges"] = [
            [left, right]
            for left, right, merged in _merges(model)
            if left in vocabulary and right in vocabulary and merged in vocabulary
        ]
    for token in content["added_tokens"]:
        token["id"] = ids[token["id"]]
    if content["post_processor"]:
        _renumber(content["post_processor"], ids)
    if content["padding"]:
        content["padding"]["pad_id"] = ids.get(content["padding"]["pad_id"], 0)
    return content


def _post_processor_ids(processor: Mapping[str, Any]) -> set[int]:
    """The ids of the special tokens that a post-processor adds."""
    found = {i for inner in processor.get("processors", ()) for i in _post_processor_ids(inner)}
    found |= {processor[name][1] for name in ("sep", "cls") if name in processor}  # BertProcessing, RobertaProcessing
    templates = processor.get("special_tokens") or {}  # TemplateProcessing
    return found | {i for token in templates.values() for i in token["ids"]}


def _renumber(processor: dict[str, Any], ids: Mapping[int, int]) -> None:
    """Replaces the ids of `_post_processor_ids`."""
    for inner in processor.get("processors", ()):
        _renumber(inner, ids)
    for name in ("sep", "cls"):
        if name in processor:
            processor[name][1] = ids[processor[name][1]]
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [ids[i] for i in token["ids"]]


def _reloaded(tokenizer: Any, content: dict[str, Any], ids: Mapping[int, int]) -> Any:
    """A tokenizer of the same class and settings with another tokenizer.json, as `from_pretrained` loads it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in Path(folder).iterdir():
            if file.name not in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                file.unlink()  # other files with a vocabulary
        (Path(folder) / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        settings_file = Path(folder) / "tokenizer_config.json"
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        if decoder := settings.get("added_tokens_decoder"):
            settings["added_tokens_decoder"] = {
                str(ids[int(i)]): token for i, token in decoder.items() if int(i) in ids
            }
            settings_file.write_text(json.dumps(settings), encoding="utf-8")
        student = type(tokenizer).from_pretrained(folder)
        student.name_or_path = ""
        return student
