"""Models with packed attention against one document a call, in float64."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModel, BertConfig, BertForMaskedLM

from minilm_kernels import QKVExtractor, record_qkv
from minilm_kernels.distill.models import position_range
from minilm_kernels.packed import models as packed_models
from minilm_kernels.packed import packed_attention, use_packed_attention
from tests.distill.families import make_teacher

from .test_attention import Largest, borders

FAMILIES = [
    "bert",
    "roberta",
    "xlm-roberta",
    "electra",
    "distilbert",
    "modernbert",
    "eurobert",
    "llama",
    "gpt2",
    "qwen3",
]
FAMILIES += ["albert", "camembert", "ernie", "gte", "nomic", "gemma", "gemma3", "embedding-gemma"]
LENGTHS = (17, 1, 5, 33, 1, 7)  # windows are shorter than the longest
ROTARY = {"modernbert", "eurobert", "llama", "qwen3", "gte", "nomic", "gemma", "gemma3", "embedding-gemma"}
WHOLE = {"use_cache": False}


def packed(model: Any, lengths: Any = LENGTHS, seed: int = 0, **more: Any) -> dict[str, Any]:
    """Arguments for one row of documents of random tokens."""
    ids = torch.randint(5, 60, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in lengths])[None] + position_range(model)[0]
    return {
        "input_ids": ids,
        "position_ids": positions,
        **packed_models.borders(borders(lengths), max(lengths)),
        **WHOLE,
        **more,
    }


def one_by_one(model: Any, batch: dict[str, Any], lengths: Any = LENGTHS) -> Tensor:
    """The last hidden states of a model that knows neither packing nor masks, (1, T, hidden)."""
    parts = zip(*(batch[name].split(lengths, 1) for name in ("input_ids", "position_ids")), strict=True)
    return torch.cat([model(input_ids=i, position_ids=p, **WHOLE).last_hidden_state for i, p in parts], 1)


def with_gradients(model: nn.Module, output: Tensor) -> list[Tensor]:
    """The output and the gradients of a weighted sum of it."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model.zero_grad()
    (output.double() * weights).sum().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference over the largest value: of outputs, and of all gradients together."""
    pairs = [(found[:1], wanted[:1]), (found[1:], wanted[1:])]
    assert len(found) == len(wanted) > 1
    return max(
        float(max((x.double() - y.double()).abs().max() for x, y in zip(xs, ys, strict=True)))
        / float(max(y.abs().max() for y in ys))
        for xs, ys in pairs
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_those_of_one_call_each(family: str) -> None:
    model: Any = make_teacher(family).double().eval()
    reference = copy.deepcopy(model)
    use_packed_attention(model)
    batch = packed(model)
    found = with_gradients(model, model(**batch).last_hidden_state)
    wanted = with_gradients(reference, one_by_one(reference, batch))
    # Some 10^4 float64 operations in another order; RoPE computes its angles in float32.
    assert difference(found, wanted) <= (2e-5 if family in ROTARY else 1e-11)
    assert difference(found, wanted) > 0


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("mask", ["bidirectional", "causal", "prefix"])
def test_masks_of_the_caller(family: str, mask: str) -> None:
    model: Any = make_teacher(family).double().eval()
    reference = copy.deepcopy(model)
    use_packed_attention(model)
    batch = packed(model)
    prefixes = torch.tensor([4, 1, 0, 30, 0, 7]) * (mask == "prefix")
    more = {"prefix_lens": prefixes} if mask == "prefix" else {"is_causal": mask == "causal"}
    found = with_gradients(model, model(**batch, **more).last_hidden_state)
    parts, outputs = zip(*(batch[x].split(LENGTHS, 1) for x in ("input_ids", "position_ids")), strict=True), []
    for (ids, positions), prefix in zip(parts, prefixes.tolist(), strict=True):
        order = torch.arange(ids.shape[1])
        seen = (order[:, None] >= order) | (order < prefix) | (mask == "bidirectional")
        outputs.append(
            reference(input_ids=ids, position_ids=positions, attention_mask=seen[None, None], **WHOLE).last_hidden_state
        )
    limit = 2e-5 if family == "llama" else 1e-11
    assert difference(found, with_gradients(reference, torch.cat(outputs, 1))) <= limit


def test_a_row_of_4097_tokens_needs_nothing_of_their_square() -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 16, "num_hidden_layers": 1}
    model: Any = AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=65, **sizes)).double().eval()
    lengths = (500,) * 8 + (97,)
    reference = copy.deepcopy(model)
    use_packed_attention(model)
    batch = packed(model, lengths)
    with Largest() as seen:
        found = with_gradients(model, model(**batch).last_hidden_state)
    assert 4097 * 16 <= seen.elements <= 4097 * 64
    assert difference(found, with_gradients(reference, one_by_one(reference, batch, lengths))) <= 1e-11


def test_documents_of_one_token() -> None:
    model: Any = make_teacher("bert").double().eval()
    reference = copy.deepcopy(model)
    use_packed_attention(model)
    lengths = (1,) * 9
    batch = packed(model, lengths)
    found = with_gradients(model, model(**batch).last_hidden_state)
    assert difference(found, with_gradients(reference, one_by_one(reference, batch, lengths))) <= 1e-11


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(family: str, reentrant: bool) -> None:
    """With dropout: the recomputed layers draw the same numbers."""
    model: Any = make_teacher(family).train()
    use_packed_attention(model)
    batch = packed(model)
    torch.manual_seed(4)
    wanted = with_gradients(model, model(**batch).last_hidden_state)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(4)
    found = with_gradients(model, model(**batch).last_hidden_state)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_attention_dropout_is_not_lost() -> None:
    model: Any = make_teacher("bert").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module is not model.encoder.layer[0].attention.self.dropout:
            module.p = 0.0
    model.encoder.layer[0].attention.self.dropout.p = 0.5
    use_packed_attention(model)
    batch = packed(model)
    assert not torch.equal(*(model(**batch).last_hidden_state for _ in range(2)))
    model.eval()
    assert torch.equal(*(model(**batch).last_hidden_state for _ in range(2)))


def test_distributed_data_parallel(tmp_path: Any) -> None:
    model: Any = make_teacher("bert").eval()
    model.pooler = None
    use_packed_attention(model)
    batch = packed(model)
    wanted = with_gradients(model, model(**batch).last_hidden_state)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, static_graph=True)
        for _ in range(2):
            found = with_gradients(model, wrapped(**batch).last_hidden_state)
            assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    finally:
        dist.destroy_process_group()


def test_compiled_models_keep_one_graph() -> None:
    """Documents of any number, if the borders are filled up with empty documents."""
    model: Any = make_teacher("bert").eval()
    use_packed_attention(model)
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for seed, lengths in enumerate(((40, 24), (10, 20, 30, 4), (1,) * 7 + (57,))):
        full = torch.cat([borders(lengths), torch.full((8 - len(lengths),), 64, dtype=torch.int32)])
        batch = packed(model, lengths, seed) | packed_models.borders(full, 57)
        found = with_gradients(model, compiled(**batch).last_hidden_state)
        wanted = with_gradients(model, model(**packed(model, lengths, seed)).last_hidden_state)
        assert difference(found, wanted) <= 1e-6
    assert graphs == 1
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training(backend: str) -> None:
    """Forward and backward; with attention dropout, whose seed comes from the generator as without compilation."""
    config = AutoConfig.for_model("bert", vocab_size=65, hidden_size=24, num_attention_heads=2, intermediate_size=48)
    config.num_hidden_layers, config.hidden_dropout_prob = 1, 0.0
    model: Any = AutoModel.from_config(config).train()
    model.pooler = None
    use_packed_attention(model)
    batch = packed(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.manual_seed(2)
    wanted = with_gradients(model, model(**batch).last_hidden_state)
    torch.manual_seed(2)
    found = with_gradients(model, compiled(**batch).last_hidden_state)
    if backend == "aot_eager":  # inductor has a generator of its own
        assert difference(found, wanted) <= 1e-5
    model.eval()
    wanted = with_gradients(model, model(**batch).last_hidden_state)
    assert difference(with_gradients(model, compiled(**batch).last_hidden_state), wanted) <= 1e-5
    assert difference(found, wanted) > 1e-3
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3", "eurobert"])
def test_autocast(family: str) -> None:
    """Norms and rotations leave queries and keys in float32 beside values in bfloat16."""
    model: Any = make_teacher(family).eval()
    reference = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        use_packed_attention(model)
        batch = packed(model)
        found = with_gradients(model, model(**batch).last_hidden_state)
        alone = with_gradients(reference, one_by_one(reference, batch))
    exact = with_gradients(reference, one_by_one(reference, batch))
    # As far from float32 as one document a call is, and twice that for other roundings.
    assert difference(found, exact) <= 2 * difference(alone, exact)


@pytest.mark.parametrize("family", ["bert", "llama", "modernbert"])
def test_extractor_and_recorder_take_borders(family: str) -> None:
    model: Any = make_teacher(family).double().eval()
    reference = copy.deepcopy(model)
    before = QKVExtractor(model)  # created before the attention is chosen
    use_packed_attention(model)
    batch = packed(model)
    del batch["use_cache"]
    found = {
        "extractor": QKVExtractor(model)(**batch),
        "earlier extractor": before(**batch),
        "frozen": QKVExtractor(model, frozen=True)(**batch),
        "after": QKVExtractor(model, rotary="after")(**batch),
    }
    for rotary in ("before", "after"):
        with record_qkv(model, [-1], rotary) as recorder:
            model(**batch, **WHOLE)
            found[f"recorder {rotary}"] = recorder.pop()[-1]
    ids, positions = (batch[name].split(LENGTHS, 1) for name in ("input_ids", "position_ids"))
    for name, qkv in found.items():
        extractor = QKVExtractor(reference, rotary="after" if "after" in name else "before")
        parts = [extractor(input_ids=i, position_ids=p) for i, p in zip(ids, positions, strict=True)]
        for x, part in zip(qkv, zip(*parts, strict=True), strict=True):
            y = torch.cat(part, 1)
            assert x.shape == y.shape
            assert (x - y).abs().max() <= (2e-5 if family in ROTARY else 1e-11) * y.abs().max(), name


def test_extractor_without_packed_attention_refuses_borders() -> None:
    model: Any = make_teacher("bert")
    with pytest.raises(TypeError, match=r"cu_seq_lens_q.*flattened batch.*use_packed_attention\(model\)"):
        QKVExtractor(model)(**packed(model))


def test_a_model_with_a_head() -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertForMaskedLM(BertConfig(vocab_size=65, **sizes)).double().eval()
    reference = copy.deepcopy(model)
    use_packed_attention(model)
    batch = packed(model.bert)
    ids, positions = (batch[name].split(LENGTHS, 1) for name in ("input_ids", "position_ids"))
    parts = [reference(input_ids=i, position_ids=p).logits for i, p in zip(ids, positions, strict=True)]
    torch.testing.assert_close(model(**batch).logits, torch.cat(parts, 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            dict.fromkeys(packed_models.BORDERS),
            "BertSelfAttention: cu_seq_lens_q and max_length_q did not arr",
        ),
        ({"max_length_q": None}, "did not arrive, without which documents would be mixed"),
        ({"attention_mask": torch.zeros(1, 64)}, "takes no attention_mask"),
        ({"attention_mask": torch.zeros(1, 1, 64, 64)}, "takes no attention_mask"),
        ({"input_ids": torch.ones(2, 32, dtype=torch.long), "position_ids": None}, "takes one row, .*got 2 rows"),
        ({"cu_seq_lens_k": borders([64])}, "cu_seq_lens_q and cu_seq_lens_k must be equal"),
        ({"softcap": 30.0}, "takes no softcap"),
        ({"position_bias": torch.zeros(1)}, "takes no position_bias"),
        ({"s_aux": torch.zeros(1)}, "takes no s_aux"),
        ({"max_length_q": 3}, "max_seqlen=3: the longest document has 33 tokens"),
    ],
)
def test_wrong_use_raises(change: dict[str, Any], words: str) -> None:
    model: Any = make_teacher("bert")
    use_packed_attention(model)
    with pytest.raises(ValueError, match=words):
        model(**{**packed(model), **change})


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("mpnet", "MPNetModel does not go through transformers' attention interface"),
        ("deberta-v2", "DebertaV2Model does not go through transformers' attention interface"),
        ("t5", "T5Model is an encoder-decoder"),
        ("gemma2", "Gemma2Model has no packed attention: Gemma2Attention: packed attention takes no softcap"),
    ],
)
def test_other_families_keep_their_attention(family: str, words: str) -> None:
    model: Any = make_teacher(family)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"model: .*{words}"):
        use_packed_attention(model)
    assert model.config._attn_implementation == before
    model(
        input_ids=torch.ones(2, 3, dtype=torch.long),
        **({"decoder_input_ids": torch.ones(2, 1, dtype=torch.long)} if family == "t5" else {}),
    )


def test_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a model of transformers, got Linear"):
        use_packed_attention(nn.Linear(2, 2))


def test_layers_that_do_not_attend_are_counted(monkeypatch: Any) -> None:
    model: Any = make_teacher("bert")
    layer = model.encoder.layer[1].attention
    monkeypatch.setattr(layer, "forward", lambda hidden, *_, **__: (hidden, None))
    with pytest.raises(ValueError, match="3 of its 4 layers attend by this function"):
        use_packed_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_forward_in_another_thread_does_not_disturb(monkeypatch: Any) -> None:
    model, other = (make_teacher("bert") for _ in range(2))
    use_packed_attention(other)
    batch, real = packed(other), packed_models._run

    def beside(*arguments: Any) -> Tensor:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(other, **batch).result(600)
        return real(*arguments)

    monkeypatch.setattr(packed_models, "_run", beside)
    use_packed_attention(model)


def test_a_model_that_mixes_documents_is_refused(monkeypatch: Any) -> None:
    def mixes(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, **options: Any) -> Tensor:
        return packed_attention(query, key, value, cu_seqlens[[0, -1]], len(query), **options)

    monkeypatch.setattr(packed_models, "packed_attention", mixes)
    with pytest.raises(ValueError, match="a document changes another one"):
        use_packed_attention(make_teacher("bert"))


def test_trying_out_leaves_no_trace() -> None:
    model: Any = make_teacher("bert").train()
    model.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    use_packed_attention(model)
    use_packed_attention(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
