"""Vocabulary trimming: the same division of text for four kinds of tokenizers, and the same outputs of the model."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertModel,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    XLMRobertaTokenizer,
)

from minilm_kernels.vocabulary import restricted, trim_vocabulary

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
NAMED = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [DOCS / f"{name}.md" for name in ("backends", "benchmarks", "cpu", "cuda", "mathematics", "quickstart")]
LINES = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines() if line.strip()][:1000]
TEXTS = [
    *LINES,
    "naïve Ünïcode – ½ 日本語 🙂 \t x",
    "Anti-dis-establishment-arianism",
    "<mask> in a text </s>",
    "",
    "   ",
]
CORPUS = TEXTS[:280:3]


def wrapped(backend):
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    return tokenizer


def word_piece():
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=1000, special_tokens=SPECIAL))
    return wrapped(backend)


def byte_level_bpe(all_merges=False, **options):
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator(LINES, trainer)
    if all_merges:  # as converted from tiktoken: every division of a token in two is a merge
        content = json.loads(backend.to_str())
        vocabulary = content["model"]["vocab"]
        merges = [
            [token[:i], token[i:]]
            for token in sorted(vocabulary, key=vocabulary.__getitem__)
            for i in range(1, len(token))
            if token not in SPECIAL and token[:i] in vocabulary and token[i:] in vocabulary
        ]
        content["model"] |= {"merges": merges, "ignore_merges": True}
        backend = Tokenizer.from_str(json.dumps(content))
    return wrapped(backend)


def bpe_of_words():
    """Merges inside words with a suffix for their end, as in CLIP; unknown characters are unknown tokens."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    backend.train_from_iterator(LINES, trainer)
    return wrapped(backend)


def unigram():
    """Pieces are the most frequent substrings; a class of transformers that builds its backend from the pieces."""
    counts = Counter(
        word[i:j]
        for line in LINES
        for word in ("▁" + part for part in line.split())
        for i in range(len(word))
        for j in range(i + 1, min(i + 9, len(word) + 1))
    )
    total = sum(counts.values())
    pieces = [(piece, math.log(count / total)) for piece, count in counts.most_common(2000)]
    vocabulary = [*((token, 0.0) for token in SPECIAL), *pieces, ("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=vocabulary)


def word_level():
    counts = Counter(word for line in LINES for word in line.split())
    words = SPECIAL + [word for word, _ in counts.most_common(1000) if word not in SPECIAL]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(backend)


KINDS = {
    "WordPiece": word_piece,
    "byte-level BPE": byte_level_bpe,
    "BPE with all merges": lambda: byte_level_bpe(all_merges=True),
    "BPE of words": bpe_of_words,
    "Unigram": unigram,
    "WordLevel": word_level,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def same_texts(teacher, trimmed, texts):
    """Asserts the same tokens for texts of kept tokens, and returns their number."""
    kept, compared = set(trimmed.teacher_ids.tolist()), 0
    texts = list(texts)
    for text, ids, found in zip(texts, *(t(texts)["input_ids"] for t in (teacher, trimmed.tokenizer)), strict=True):
        if set(ids) <= kept and teacher.unk_token_id not in ids:
            assert found == trimmed.student_ids[torch.tensor(ids)].tolist(), text
            compared += 1
    return compared


def test_texts_of_kept_tokens_have_the_same_tokens(tokenizer, tmp_path):
    trimmed = trim_vocabulary(tokenizer, CORPUS)
    assert len(trimmed.tokenizer) == len(trimmed.teacher_ids) < len(tokenizer)
    known = sum(tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text in CORPUS)
    assert same_texts(tokenizer, trimmed, CORPUS) == known
    # Words of the other texts, of which many have only kept tokens; they were divided in other contexts.
    words = {word for text in TEXTS for word in text.split()}
    assert same_texts(tokenizer, trimmed, words) > 200

    names = tokenizer.get_vocab()
    expected = {token: int(trimmed.student_ids[i]) for token, i in names.items() if i in trimmed.teacher_ids.tolist()}
    assert trimmed.tokenizer.get_vocab() == expected
    for name in NAMED:
        assert getattr(trimmed.tokenizer, name) == getattr(tokenizer, name)
    trimmed.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == expected
    assert [again(text)["input_ids"] for text in TEXTS] == [trimmed.tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.slow
def test_sizes(tokenizer):
    size = 330
    by_count = trim_vocabulary(tokenizer, CORPUS, size)
    by_id = trim_vocabulary(tokenizer, size=size)
    assert len(by_count.tokenizer) == len(by_id.tokenizer) == size
    kept = set(by_count.teacher_ids.tolist())
    counts = Counter(i for text in CORPUS for i in tokenizer(text, add_special_tokens=False)["input_ids"])
    assert {token for token, _ in counts.most_common(size // 8)} <= kept
    for trimmed in (by_count, by_id):
        same_texts(tokenizer, trimmed, {word for text in TEXTS for word in text.split()})
        dropped = torch.ones(len(tokenizer), dtype=torch.bool)
        dropped[trimmed.teacher_ids] = False
        assert (trimmed.student_ids[dropped] == trimmed.tokenizer.unk_token_id).all()
        assert trimmed.student_ids[trimmed.teacher_ids].tolist() == list(range(size))


def test_no_text_of_bytes_is_unknown():
    trimmed = trim_vocabulary(byte_level_bpe(), ["a"])
    for text in TEXTS:
        ids = trimmed.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert trimmed.tokenizer.unk_token_id not in ids
        assert trimmed.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram"])
def test_words_of_kept_characters_are_divided_again(kind):
    """Dropped tokens become shorter ones in the student's tokenizer, not unknown."""
    teacher = KINDS[kind]()
    trimmed = trim_vocabulary(teacher, ["the student has tokens"])
    dropped = [word for word in ("dent", "nest", "sat", "shadows") if teacher.tokenize(word) != list(word)]
    assert dropped
    for word in ("dent", "nest", "sat", "thus"):
        assert trimmed.tokenizer.unk_token not in trimmed.tokenizer.tokenize(word), word


def test_parts_of_merges_are_kept():
    """ "abc" is built by way of "ab", which is no token of the corpus."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6, "d": 7}
    backend = Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")], unk_token="<unk>"))
    teacher = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    trimmed = trim_vocabulary(teacher, ["abc"])
    assert trimmed.teacher_ids.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert trimmed.tokenizer.tokenize("abc") == ["abc"]


def test_the_lowest_score_of_unigram_is_kept():
    """It gives the score of unknown characters: here "ab" + unknown is better than "a" + "bx" only if "z" counts."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("z", -50.0)]
    trimmed = trim_vocabulary(XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)]), ["a"])
    assert "z" in trimmed.tokenizer.get_vocab()


def test_the_vocabulary_can_be_restored(tokenizer):
    trimmed = trim_vocabulary(tokenizer, CORPUS, 600)
    again = restricted(tokenizer, trimmed.teacher_ids)
    assert torch.equal(again.student_ids, trimmed.student_ids)
    assert again.tokenizer.get_vocab() == trimmed.tokenizer.get_vocab()
    assert trim_vocabulary(tokenizer, iter(CORPUS), 600).teacher_ids.equal(trimmed.teacher_ids)


def test_ids_of_another_tokenizer_cannot_be_restored():
    with pytest.raises(ValueError, match="teacher_ids: special tokens are missing"):
        restricted(word_level(), torch.tensor([4, 5, 6]))


def test_a_tokenizer_without_unknown_token():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    teacher = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="no unknown, padding or end token"):
        trim_vocabulary(teacher, ["a"])
    teacher.add_special_tokens({"eos_token": "<end>"})
    trimmed = trim_vocabulary(teacher, ["a"])
    assert trimmed.student_ids.tolist() == [0, 1, 1]  # "b" becomes the end of text


class TestErrors:
    def test_arguments(self, tokenizer):
        with pytest.raises(TypeError, match="texts: expected several"):
            trim_vocabulary(tokenizer, "text")
        with pytest.raises(ValueError, match="texts, size: give at least one"):
            trim_vocabulary(tokenizer)
        with pytest.raises(TypeError, match="size: expected an int"):
            trim_vocabulary(tokenizer, size=1.5)
        with pytest.raises(ValueError, match=r"size=3: .* \d+ .* always kept"):
            trim_vocabulary(tokenizer, size=3)

    def test_other_tokenizers(self):
        with pytest.raises(ValueError, match="got ByT5Tokenizer"):
            trim_vocabulary(ByT5Tokenizer(), size=10)
        with pytest.raises(ValueError, match="tokenizer: expected"):
            trim_vocabulary(Tokenizer(models.BPE()), size=10)


SIZES = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
FAMILIES = {
    "bert": {**SIZES, "pad_token_id": 1},
    "xlm-roberta": {**SIZES, "max_position_embeddings": 80},
    "llama": {**SIZES, "pad_token_id": 1},
    "gpt2": {"n_layer": 2, "n_embd": 24, "n_head": 2},
    "t5": {"num_layers": 2, "d_model": 24, "d_kv": 12, "num_heads": 2, "d_ff": 48, "pad_token_id": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trimmed_model_computes_the_same(family, tmp_path):
    """Kept rows are those of the same tokens: on texts of kept tokens, both models have the same output."""
    teacher_tokenizer = unigram()
    trimmed = trim_vocabulary(teacher_tokenizer, CORPUS)
    ids = {f"{name}_token_id": getattr(teacher_tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    settings = {"vocab_size": len(teacher_tokenizer) + 7, **ids, **FAMILIES[family]}  # with rows of no token
    teacher = AutoModel.from_config(AutoConfig.for_model(family, **settings)).eval()
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    student = trimmed.trim(teacher).eval()
    assert student.config.vocab_size == student.get_input_embeddings().weight.shape[0] == len(trimmed.tokenizer)
    for name in ("pad", "bos", "eos"):
        if (value := getattr(teacher.config, f"{name}_token_id")) is not None:
            assert getattr(student.config, f"{name}_token_id") == trimmed.student_ids[value]
    batch = teacher_tokenizer(CORPUS[:8], padding=True, truncation=True, max_length=60, return_tensors="pt")
    mine = trimmed.tokenizer(CORPUS[:8], padding=True, truncation=True, max_length=60, return_tensors="pt")
    assert torch.equal(mine["input_ids"], trimmed.student_ids[batch["input_ids"]])
    batch, mine = ({"input_ids": x["input_ids"], "attention_mask": x["attention_mask"]} for x in (batch, mine))
    if family == "t5":
        batch |= {"decoder_input_ids": batch["input_ids"]}
        mine |= {"decoder_input_ids": mine["input_ids"]}
    with torch.no_grad():
        expected, found = teacher(**batch).last_hidden_state, student(**mine).last_hidden_state
    assert torch.equal(found, expected)
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path).state_dict(), student.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        student.get_input_embeddings().weight.zero_()
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


def test_a_padding_id_that_no_token_has():
    """Some teachers have more rows than their tokenizer has tokens, and pad with one of these rows."""
    teacher_tokenizer = unigram()
    count = len(teacher_tokenizer)
    teacher = AutoModel.from_config(
        AutoConfig.for_model("llama", **SIZES, vocab_size=count + 8, pad_token_id=count + 2)
    )
    student = trim_vocabulary(teacher_tokenizer, CORPUS[:2]).trim(teacher)
    assert student.config.pad_token_id is None


def test_models_that_cannot_be_trimmed():
    trimmed = trim_vocabulary(word_level(), CORPUS)
    small = AutoConfig.for_model("bert", vocab_size=20, **SIZES)
    with pytest.raises(ValueError, match="has 20 rows"):
        trimmed.trim(BertModel(small))
    with pytest.raises(TypeError, match="got Linear"):
        trimmed.trim(torch.nn.Linear(2, 2))
    # Positions of RoBERTa begin after the padding token, whose id is 3 here and would become 1.
    words = {word: i for i, word in enumerate(["<unk>", "x", "y", "<pad>", "z"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    roberta = AutoConfig.for_model("roberta", vocab_size=5, pad_token_id=3, **SIZES)
    with pytest.raises(ValueError, match=r"embeddings\.position_embeddings begin after .* from 3 to 1"):
        trim_vocabulary(tokenizer, ["z"]).trim(AutoModel.from_config(roberta))
