"""record_qkv: values, gradients, wrappers around the model, misuse, and the model after removal.

Wrappers and their tests:

    none                        test_values_and_gradients_are_those_of_the_extractor, test_a_fused_projection_is_divided
    several processes           test_wrappers_of_several_processes: DDP in three modes, FSDP2 in bfloat16, with any
                                layers and with checkpointing, both compiled outside or inside, the relation alone
    torch.compile               test_compiled_to_one_graph, test_compiled_with_inductor,
                                test_forwards_that_are_not_popped_are_not_compiled_again,
                                test_a_compiled_step_with_pop_inside, test_a_recorder_after_compilation_and_its_removal
    layer.compile()             test_regional_compilation
    checkpointing               test_gradient_checkpointing, test_gradient_checkpointing_with_the_relation_alone,
                                test_a_checkpoint_around_the_model, test_compiled_with_checkpointing
    autocast                    test_autocast
    adapters                    test_adapters, test_adapters_of_several_families
    sentence-transformers       test_sentence_transformers
    copies, threads             test_a_deep_copy_uses_its_own_weights_and_records_nothing,
                                test_threads_have_their_own_recordings
    accelerate's hooks          test_a_forward_on_the_instance_is_kept
    DataParallel, offloading    test_other_wrong_arguments
"""

import contextlib
import copy
import gc
import io
import sys
import weakref
from collections import Counter
from collections.abc import Callable

import accelerate
import peft
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, LlamaForCausalLM, PreTrainedModel

from minilm_kernels import QKV, QKVExtractor, record_qkv

from .processes import run_two
from .test_qkv import (
    BERT_LIKE,
    KNOWN,
    PLAIN,
    SMALL,
    TOKENS,
    Plain,
    assert_equal,
    batch_of,
    by_hand,
    loss_of,
    make,
    make_rotary,
    run_in_threads,
    snapshot,
)
from .test_wrappers import adapted, adapted_values, folder

__all__ = ["folder"]  # a fixture

ROTARY = pytest.mark.parametrize("rotary", ["before", "after"])
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(layers: int = 3, **overrides) -> PreTrainedModel:
    """A model in training mode that is the same in every call."""
    torch.manual_seed(0)
    return make("bert", layers, **(NO_DROPOUT | overrides)).train()


def small(model_type: str, **overrides) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(model_type, **(SMALL | overrides))).eval()


FAMILIES = {
    **{name: lambda name=name: make(name) for name in KNOWN},
    **{name: lambda name=name: small(name, max_position_embeddings=40, **BERT_LIKE[name]) for name in BERT_LIKE},
    **{name: lambda name=name: make_rotary(name) for name in ("llama", "qwen3")},
}
FUSED = {
    "gpt2": {"n_inner": 64},
    "gpt_neox": {"max_position_embeddings": 40},
    "modernbert": {"pad_token_id": 0, "global_attn_every_n_layers": 1},
    "phi3": {"pad_token_id": 0, "num_key_value_heads": 2},
}


def gradients(loss: torch.Tensor, model: nn.Module, retain: bool = False) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), None, retain, allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def stored_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def joint_loss(call, recorder: record_qkv, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss of the output, and of what one forward records."""
    output = call(**batch)[0]
    return output.square().mean() + sum(loss_of(qkv) for qkv in recorder.pop().values())


def plain_gradients(
    batch: dict[str, torch.Tensor], rotary: str = "before", make=bert, layers=(2, -1)
) -> dict[str, torch.Tensor]:
    """Gradients of the joint loss without any wrapper."""
    model = make()
    with record_qkv(model, layers, rotary) as recorder:
        return gradients(joint_loss(model, recorder, batch), model)


def close(found, expected, atol: float = 1e-7) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


# Values


ROTATED = ("llama", "qwen3", "gpt_neox", "modernbert", "phi3")


@pytest.mark.parametrize(
    ("family", "rotary"),
    [*((family, "before") for family in (*FAMILIES, *FUSED)), *((family, "after") for family in ROTATED)],
)
def test_values_and_gradients_are_those_of_the_extractor(family, rotary):
    """The values of all model types are compared by tests/architectures."""
    model, batch = FAMILIES[family]() if family in FAMILIES else small(family, **FUSED[family]), batch_of()
    with record_qkv(model, [1, -1], rotary) as recorder:
        model(**batch)
        recorded = recorder.pop()
    for layer, found in recorded.items():
        expected = QKVExtractor(model, layer, rotary=rotary)(**batch)
        assert_equal(found, expected, 0)
        close(gradients(loss_of(found), model, retain=True), gradients(loss_of(expected), model), 0)


@pytest.mark.parametrize("family", FUSED)
def test_a_fused_projection_is_divided(family):
    """Position 0 is not rotated, so that attention receives query and key as they were projected."""
    model, ids = small(family, **FUSED[family]), torch.randint(5, 200, (2, 7))
    assert model.config.num_attention_heads == 4
    with record_qkv(model, [2], "before") as before, record_qkv(model, [2], "after") as after:
        model(input_ids=ids)
        before, after = before.pop()[2], after.pop()[2]
    assert torch.equal(before.value, after.value)
    first = slice(None) if family == "gpt2" else slice(1)
    assert_equal(QKV(*(x[:, first] for x in before)), QKV(*(x[:, first] for x in after)))
    assert (before.query - before.key[..., :1]).abs().min() > 0
    assert [x.shape[-1] for x in before] == ([48, 24, 24] if family == "phi3" else [48] * 3)


def test_after_has_the_scale_that_a_model_gives_its_queries():
    model = small("opt", ffn_dim=64, word_embed_proj_dim=48, max_position_embeddings=40)
    with record_qkv(model, [1]) as before, record_qkv(model, [1], "after") as after:
        model(**batch_of())
        before, after = before.pop()[1], after.pop()[1]
    assert_equal(QKV(before.query * 12**-0.5, before.key, before.value), after)


def test_projections_of_a_model_of_one_s_own():
    model = Plain(offset=1.0)  # with projections of different inputs, which the extractor refuses
    with record_qkv(model, [1, 2], projections=PLAIN) as recorder:
        model(TOKENS)
        found = recorder.pop()[2]
    hidden = model.blocks[1].norm(model.blocks[0](model.embed(TOKENS)))
    assert_equal(found, QKV(model.blocks[1].q(hidden), model.blocks[1].k(hidden), model.blocks[1].v(hidden + 1)), 0)
    model.blocks[1].k = model.blocks[1].q
    with pytest.raises(ValueError, match=r"blocks\.1\.k has the same module as another projection"):
        record_qkv(model, projections=PLAIN)


def test_layers_are_named_as_they_were_asked_for():
    model = bert()
    with record_qkv(model, [-1, 3, 1]) as recorder:
        model(**batch_of())
        recorded = recorder.pop()
    assert list(recorded) == [-1, 3, 1]
    assert_equal(recorded[-1], recorded[3], 0)
    assert not torch.equal(recorded[1].query, recorded[3].query)


# The model after removal


@ROTARY
@pytest.mark.parametrize("checkpointing", [False, True])
def test_removal_leaves_the_model_as_it_was(rotary, checkpointing):
    model, batch = bert(), batch_of()
    model(**batch)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before, text = snapshot(model), model.config.to_json_string()
    first, second = record_qkv(model, [1, -1], rotary), record_qkv(model, [-1], rotary)
    model(**batch)
    assert model.config.to_json_string() == text
    first.remove()
    first.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        first.pop()
    model(**batch)
    with pytest.raises(RuntimeError, match="more than once"):
        second.pop()
    model(**batch)
    second.pop()
    second.remove()
    after = snapshot(model)
    close(after.pop("tensors"), before.pop("tensors"), 0)
    assert after == before


def test_checkpointing_that_was_disabled_meanwhile_stays_disabled():
    model = bert()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with record_qkv(model, [2]):
        model(**batch_of())
        model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@ROTARY
def test_recorders_of_one_layer_are_independent(rotary):
    model, batch = bert(), batch_of()
    first = record_qkv(model, [2], rotary)
    second = record_qkv(model, [2, 3], rotary)
    model(**batch)
    assert_equal(first.pop()[2], second.pop()[2], 0)
    first.remove()
    model(**batch)
    assert list(second.pop()) == [2, 3]
    with record_qkv(model, [2], {"before": "after", "after": "before"}[rotary]) as other:
        model(**batch)
        assert_equal(second.pop()[2], other.pop()[2], 0)
    second.remove()


def test_a_forward_on_the_instance_is_kept():
    """accelerate's hooks replace the forward of modules."""
    batch, expected = batch_of(), bert()
    places = dict.fromkeys(["embeddings", "encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "pooler"], "cpu")
    model = accelerate.dispatch_model(bert(), places, force_hooks=True)
    for module in model.encoder.layer[2].attention.self.children():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu"))
    query = model.encoder.layer[2].attention.self.query
    before = vars(query)["forward"]
    with record_qkv(model) as recorder:
        model(**batch)
        twin = copy.deepcopy(model)
        assert_equal(recorder.pop()[-1], by_hand(expected, 3, batch), 0)
    assert vars(query)["forward"] is before
    with torch.no_grad():
        twin.encoder.layer[2].attention.self.query.weight.zero_()
        assert not torch.equal(twin(**batch)[0], model(**batch)[0])

    model = bert()
    recorder = record_qkv(model)  # a hook after the recorder, removed after it
    query = model.encoder.layer[2].attention.self.query
    accelerate.hooks.add_hook_to_module(query, accelerate.hooks.AlignDevicesHook("cpu"))
    model(**batch)
    assert_equal(recorder.pop()[-1], by_hand(expected, 3, batch), 0)
    recorder.remove()
    model(**batch)
    accelerate.hooks.remove_hook_from_module(query)
    assert_equal(by_hand(model, 3, batch), by_hand(expected, 3, batch), 0)


# Copies, threads and extractors


@ROTARY
def test_a_deep_copy_uses_its_own_weights_and_records_nothing(rotary):
    model, batch = bert(), batch_of()
    recorder = record_qkv(model, [-1], rotary)
    twin = copy.deepcopy(model)
    twin(**batch)
    with pytest.raises(RuntimeError, match="did not run"):
        recorder.pop()
    model(**batch)
    expected = recorder.pop()[-1]
    with torch.no_grad():
        twin.encoder.layer[-1].attention.self.query.weight.zero_()
    with record_qkv(twin, [-1], rotary) as other:
        twin(**batch)
        model(**batch)
        assert_equal(recorder.pop()[-1], expected, 0)
        found = other.pop()[-1]
    assert torch.equal(found.query, twin.encoder.layer[-1].attention.self.query.bias.expand_as(found.query))
    assert torch.equal(found.key, expected.key)
    recorder.remove()
    output = twin(**batch)[0]
    assert not torch.equal(output, model(**batch)[0])
    assert twin.config._attn_implementation == model.config._attn_implementation == "sdpa"
    clean = bert()
    clean.load_state_dict(twin.state_dict())
    assert torch.equal(clean(**batch)[0], output)


@pytest.mark.parametrize("rotary", ["before"])
def test_a_recorded_model_can_be_pickled(rotary):
    model, batch, file = bert(), batch_of(), io.BytesIO()
    with record_qkv(model, [-1], rotary) as recorder:
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert torch.equal(twin(**batch)[0], model(**batch)[0])
        recorder.pop()


@ROTARY
def test_threads_have_their_own_recordings(rotary):
    model, wrong = bert(1).eval(), []
    batches = [batch_of(length=length) for length in (5, 9, 13, 17)]
    expected = [by_hand(model, 1, batch) for batch in batches]
    with record_qkv(model, [1], rotary) as recorder:

        def work(i: int) -> None:
            for j in (i, (i + 1) % 4) * 10:
                with torch.no_grad():
                    model(**batches[j])
                if any((a - b).abs().max() > 1e-6 for a, b in zip(recorder.pop()[1], expected[j], strict=True)):
                    wrong.append(j)

        run_in_threads(work, 4)
        model(**batches[0])
        run_in_threads(lambda _: recorder.clear(), 1)  # has nothing to clear
        recorder.pop()
    assert not wrong


def test_an_extractor_of_a_recorded_model():
    model, batch = bert(), batch_of()
    expected = by_hand(model, 3, batch)
    with record_qkv(model, [3]) as recorder:
        extractor = QKVExtractor(model, 3)
        recorder.clear()
        assert_equal(extractor(**batch), expected, 0)
        recorder.clear()
        model(**batch)
        assert_equal(recorder.pop()[3], expected, 0)
    assert_equal(extractor(**batch), expected, 0)


@ROTARY
def test_generation(rotary):
    model, ids = LlamaForCausalLM(make_rotary().config).eval(), torch.randint(5, 200, (2, 5))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **options)
    with record_qkv(model, rotary=rotary) as recorder:
        assert torch.equal(model.generate(ids, **options), expected)
        recorder.clear()
        model(ids)
        assert recorder.pop()[-1].query.shape == (2, 5, 48)


# Gradient checkpointing, autocast, adapters, sentence-transformers


@ROTARY
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("enabled_first", [False, True])
def test_gradient_checkpointing(rotary, reentrant, enabled_first):
    model, batch, runs = bert(), batch_of(), []
    expected = plain_gradients(batch, rotary)
    for i, layer in enumerate(model.encoder.layer):
        layer.attention.self.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    if enabled_first:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with record_qkv(model, [2, -1], rotary) as recorder:
        if not enabled_first:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for _ in range(2):
            model.zero_grad()
            joint_loss(model, recorder, batch).backward()
            assert model.encoder.layer[0].gradient_checkpointing
    assert sorted(runs) == [0, 0, 0, 0, 1, 1, 2, 2]  # only the first layer is computed again
    close(stored_gradients(model), expected)
    assert all(layer.gradient_checkpointing for layer in model.encoder.layer)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_the_relation_alone(reentrant):
    model, batch = bert(), batch_of()
    with record_qkv(model, [2, -1]) as recorder:
        expected = gradients(relation_alone(model, recorder, batch), model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        relation_alone(model, recorder, batch).backward()
    close(stored_gradients(model), expected)
    assert any(gradient.any() for name, gradient in expected.items() if name.startswith("encoder.layer.0"))


def test_a_checkpoint_around_the_model():
    """Without reentrance the recording is right, and the second one, in the backward, is ignored."""
    model, batch = bert(), batch_of()
    expected = plain_gradients(batch)
    with record_qkv(model, [2, -1]) as recorder:

        def call(**batch):
            return checkpoint(lambda ids, mask: model(ids, mask)[0], *batch.values(), use_reentrant=False)[None]

        joint_loss(call, recorder, batch).backward()
        close(stored_gradients(model), expected)
        with pytest.raises(RuntimeError, match="did not run"):
            recorder.pop()
        hidden = model.embeddings(batch["input_ids"])
        checkpoint(lambda x: model(inputs_embeds=x)[0], hidden, use_reentrant=True)
        with pytest.raises(RuntimeError, match=r"layer 2 was recorded without gradient.*reentrant"):
            recorder.pop()


@ROTARY
def test_autocast(rotary):
    model, batch = bert(), batch_of()
    with record_qkv(model, [-1], rotary) as recorder, torch.autocast("cpu", torch.bfloat16):
        model(**batch)
        found, expected = recorder.pop()[-1], QKVExtractor(model)(**batch)
    assert found.query.dtype == torch.bfloat16
    assert_equal(found, expected, 0)
    close(gradients(loss_of(found), model), gradients(loss_of(expected), model), 0)


def test_adapters():
    model, batch = bert(2), batch_of()
    early = record_qkv(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"]))
    wrapped(**batch)
    with pytest.raises(RuntimeError, match=r"layer 2: encoder\.layer\.1\.attention\.self\.query was replaced"):
        early.pop()
    early.remove()

    wrapped = adapted().eval()
    expected = adapted_values(wrapped, batch)
    for rotary in ("before", "after"):
        with record_qkv(wrapped, [-1], rotary) as recorder:
            wrapped(**batch)
            found = recorder.pop()[-1]
            assert_equal(found, expected, 0)
            with wrapped.disable_adapter():
                wrapped(**batch)
            assert (recorder.pop()[-1].query - found.query).abs().max() > 0.1
    trained = {name for name, gradient in gradients_of_trained(loss_of(found), wrapped).items() if gradient.any()}
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)


def gradients_of_trained(loss: torch.Tensor, model: nn.Module, allow_unused: bool = False) -> dict[str, torch.Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=allow_unused)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_with_checkpointing(reentrant):
    batch, found = batch_of(), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        wrapped = adapted().train()
        for module in wrapped.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            wrapped.gradient_checkpointing_enable({"use_reentrant": reentrant})
            wrapped.enable_input_require_grads()
        with record_qkv(wrapped, [2]) as recorder:
            joint_loss(wrapped, recorder, batch).backward()
        found.append({n: p.grad for n, p in wrapped.named_parameters() if "lora_" in n})
    close(*found)


LORA = {"bert": ["query", "value"], "qwen3": ["q_proj", "v_proj"], "modernbert": ["Wqkv"], "gpt2": ["c_attn"]}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("family", LORA)
def test_adapters_of_several_families(family, checkpointing):
    """Every adapter up to the recorded layer is trained, by the values that the adapted layers compute."""
    families = {"bert": bert, "qwen3": lambda: make_rotary("qwen3")}
    model = families[family]() if family in families else small(family, **FUSED[family])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    options = {"target_modules": LORA[family], "init_lora_weights": False, "fan_in_fan_out": family == "gpt2"}
    wrapped, batch = peft.get_peft_model(model, peft.LoraConfig(**options)).train(), batch_of()
    with record_qkv(wrapped, [2]) as recorder:
        expected = gradients_of_trained(relation_alone(wrapped, recorder, batch), wrapped, allow_unused=True)
        if checkpointing is not None:
            wrapped.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            wrapped.enable_input_require_grads()
        relation_alone(wrapped, recorder, batch).backward()
    found = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    close(found, expected)
    assert len(found) == 2 * 2 * len(LORA[family])  # layers, two matrices of an adapter, modules


def test_sentence_transformers(folder):
    bert().save_pretrained(folder)
    sentences = SentenceTransformer(str(folder), device="cpu")
    features = sentences.preprocess(["w1 w2 w3", "w4"])
    with record_qkv(sentences) as recorder:
        loss = sentences(features)["sentence_embedding"].square().mean()
        found = recorder.pop()[-1]
    batch = {name: features[name] for name in ("input_ids", "attention_mask")}
    assert_equal(found, QKVExtractor(sentences)(**batch), 0)
    (loss + loss_of(found)).backward()


def test_checkpointed_sentence_transformers(folder):
    """sentence-transformers calls the forward of its model without the hooks of the model."""
    bert().save_pretrained(folder)
    found = []
    for reentrant in (None, False, True):
        sentences = SentenceTransformer(str(folder), device="cpu").train()
        if reentrant is not None:
            sentences.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with record_qkv(sentences, [2]) as recorder:
            loss = sentences(sentences.preprocess(["w1 w2 w3", "w4"]))["sentence_embedding"].square().mean()
            (loss + loss_of(recorder.pop()[2])).backward()
        found.append({name: p.grad for name, p in sentences.named_parameters() if p.grad is not None})
    close(*found[:2])
    close(*found[1:])


# torch.compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@ROTARY
@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("bert", "eager"),
        pytest.param("bert", "aot_eager", marks=pytest.mark.slow),
        *(pytest.param(family, "eager", marks=pytest.mark.slow) for family in ("qwen3", "gpt2", "modernbert")),
    ],
)
def test_compiled_to_one_graph(family, backend, rotary, dynamo):
    make = {"bert": lambda: bert(2), "qwen3": lambda: make_rotary("qwen3", 2)}
    model = make[family]() if family in make else small(family, **FUSED[family])
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with record_qkv(compiled, [2, -1], rotary) as recorder:
        for batch in (batch_of(), batch_of(), batch_of(2 + 2, 7)):
            expected = gradients(joint_loss(model, recorder, batch), model)
            close(gradients(joint_loss(compiled, recorder, batch), model), expected, 1e-6)
        assert counter.frame_count <= 2  # one for the other shape


@pytest.mark.slow
def test_compiled_with_inductor(dynamo):
    model, batch = bert(2), batch_of()
    with record_qkv(model, [1]) as recorder:
        expected = gradients(joint_loss(model, recorder, batch), model)
        close(gradients(joint_loss(torch.compile(model, fullgraph=True), recorder, batch), model), expected, 1e-6)


def test_forwards_that_are_not_popped_are_not_compiled_again(dynamo):
    """A list or a count of forwards would be guarded, and each forward compiled anew."""
    model, batch, counter = bert(1), batch_of(), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with record_qkv(compiled) as recorder:
        for _ in range(6):
            compiled(**batch)
        assert counter.frame_count <= 3
        with pytest.raises(RuntimeError, match="more than once"):
            recorder.pop()
        compiled(**batch)
        recorder.pop()


@ROTARY
@pytest.mark.slow
@pytest.mark.parametrize("compile_first", [False, True])
def test_regional_compilation(rotary, compile_first, dynamo):
    """The layers share their compiled code, which must not make one of them record for the others or not at all."""
    model, batch = bert(4), batch_of()
    with record_qkv(model, [2, -1], rotary) as recorder:
        model(**batch)
        expected = recorder.pop()
    for layer in model.encoder.layer:
        layer.compile(backend="aot_eager")
    if compile_first:
        model(**batch)
    with record_qkv(model, [2, -1], rotary) as recorder:
        for _ in range(2):
            model(**batch)
            found = recorder.pop()
            for layer in (2, -1):
                assert_equal(found[layer], expected[layer], 1e-6)
    model(**batch)
    assert not recorder._compiled.found


@ROTARY
@pytest.mark.slow
def test_a_recorder_after_compilation_and_its_removal(rotary, dynamo):
    model, batch = bert(1), batch_of()
    compiled = torch.compile(model, backend="eager")
    compiled(**batch)
    recorder = record_qkv(compiled, [-1], rotary)
    compiled(**batch)
    assert_equal(recorder.pop()[-1], by_hand(model, 1, batch))
    compiled(**batch)
    compiled(**batch)
    with pytest.raises(RuntimeError, match="more than once"):
        recorder.pop()
    twin = torch.compile(copy.deepcopy(model), backend="eager")
    twin(**batch)
    with pytest.raises(RuntimeError, match="did not run"):
        recorder.pop()
    recorder.remove()
    compiled(**batch)
    assert not recorder._compiled.found
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_compiled_step_with_pop_inside(dynamo):
    model, batch = bert(2), batch_of()
    with record_qkv(model, [-1]) as recorder:
        expected = joint_loss(model, recorder, batch)
        step = torch.compile(lambda **batch: joint_loss(model, recorder, batch), backend="aot_eager", fullgraph=True)
        for _ in range(2):
            close(step(**batch), expected)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_with_checkpointing(fullgraph, dynamo):
    model, batch = bert(), batch_of()
    expected = plain_gradients(batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with record_qkv(model, [2, -1]) as recorder:
        for _ in range(2):
            model.zero_grad()
            joint_loss(lambda **batch: compiled(**batch, use_cache=False), recorder, batch).backward()
            close(stored_gradients(model), expected, 1e-6)


# Several processes

MODES = {"plain": {}, "find_unused": {"find_unused_parameters": True}, "static_graph": {"static_graph": True}}
BATCH = {"input_ids": torch.arange(60).view(4, 15) + 5, "attention_mask": torch.ones(4, 15, dtype=torch.long)}


def without_pooler() -> PreTrainedModel:
    model = bert()
    model.pooler = None
    return model


def seeded_qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    return make_rotary("qwen3")


def shard(model: PreTrainedModel, **options) -> PreTrainedModel:
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for part in (*layers, model):
        fully_shard(part, **options)
    return model


def compile_layers(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.encoder.layer:
        layer.compile(backend="aot_eager")
    return model


def checkpointed(model: PreTrainedModel, reentrant: bool) -> PreTrainedModel:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")


def small_buckets(model: nn.Module) -> nn.Module:
    """Compilation divides the graph of the forward where a bucket ends."""
    return DistributedDataParallel(model, bucket_cap_mb=0.01)


WRAPPERS = {
    **{f"DDP {name}": lambda model, o=options: DistributedDataParallel(model, **o) for name, options in MODES.items()},
    "compile(DDP)": lambda model: compiled(small_buckets(model)),
    "DDP(compile)": lambda model: small_buckets(compiled(model)),
    "DDP(layer.compile)": lambda model: DistributedDataParallel(compile_layers(model)),
    "DDP(checkpointing)": lambda model: DistributedDataParallel(checkpointed(model, False)),
    "FSDP2": shard,
    "FSDP2, bfloat16": lambda model: shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
    "FSDP2, layer.compile": lambda model: compile_layers(shard(model)),
    "compile(FSDP2)": lambda model: compiled(shard(model)),
    "FSDP2, checkpointing": lambda model: shard(checkpointed(model, False)),
    "FSDP2, reentrant": lambda model: shard(checkpointed(model, True)),
}


def gradients_of_processes(
    rank: int, wrap, rotary: str, recorder_first: bool, make=without_pooler, loss_of_step=joint_loss, layers=(2, -1)
) -> dict[str, torch.Tensor]:
    torch._dynamo.reset()
    model = make()
    recorder = record_qkv(model, layers, rotary) if recorder_first else None
    wrapped = wrap(model)
    recorder = recorder or record_qkv(wrapped, layers, rotary)
    for _ in range(2):
        model.zero_grad()
        loss_of_step(wrapped, recorder, {name: x[2 * rank : 2 * rank + 2] for name, x in BATCH.items()}).backward()
    found = stored_gradients(model)
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}


def relation_alone(call, recorder: record_qkv, batch: dict, zero: float | None = None) -> torch.Tensor:
    output = call(**batch)[0]
    loss = sum(loss_of(qkv) for qkv in recorder.pop().values())
    return loss if zero is None else loss + zero * output.sum()


def check_wrappers(rank: int, _: str) -> None:
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 4000
    expected = {rotary: plain_gradients(BATCH, rotary, without_pooler) for rotary in ("before", "after")}
    for i, (name, wrap) in enumerate(WRAPPERS.items()):
        for rotary in ("before", "after") if name in ("DDP plain", "FSDP2") else ("before",):
            print(name, rotary, flush=True)
            found = gradients_of_processes(rank, wrap, rotary, recorder_first=i % 2 == 0)
            largest = max(float(gradient.abs().max()) for gradient in expected[rotary].values())
            close(found, expected[rotary], (2e-2 if "bfloat16" in name else 1e-6) * largest)
    others = {name: lambda name=name: small(name, **FUSED[name]) for name in ("gpt2", "modernbert")}
    for family, maker in {"qwen3": seeded_qwen3, **others}.items():
        expected_of_family = plain_gradients(BATCH, make=maker)
        for name in ("DDP plain", "FSDP2"):
            print(family, name, flush=True)
            found = gradients_of_processes(rank, WRAPPERS[name], "before", name == "FSDP2", maker)
            close(found, expected_of_family, 1e-5)


def check_layers_and_the_relation_alone(rank: int, _: str) -> None:
    for i, layers in enumerate(((2,), (-1,), (1, 2, -1))):
        print("FSDP2", layers, flush=True)
        found = gradients_of_processes(rank, WRAPPERS["FSDP2"], "before", i == 0, layers=layers)
        close(found, plain_gradients(BATCH, make=without_pooler, layers=layers), 1e-6)
    model = without_pooler()
    with record_qkv(model, [2, -1]) as recorder:
        alone = gradients(relation_alone(model, recorder, BATCH), model)

    def with_zero(call, recorder, batch):
        return relation_alone(call, recorder, batch, 0.0)

    for name in ("DDP plain", "DDP find_unused", "DDP static_graph", "FSDP2"):
        for rotary in ("before", "after"):
            close(gradients_of_processes(rank, WRAPPERS[name], rotary, True, loss_of_step=with_zero), alone, 1e-6)
            with pytest.raises(RuntimeError, match="the loss does not depend on the output of the model"):
                gradients_of_processes(rank, WRAPPERS[name], rotary, True, loss_of_step=relation_alone)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_wrappers, check_layers_and_the_relation_alone])
def test_wrappers_of_several_processes(check, tmp_path):
    run_two(check, tmp_path)


# Cost


class Operations(TorchDispatchMode):
    """Counts tensor operations."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


def bytecodes(call: Callable[[], object]) -> int:
    """The number of Python's instructions that a call executes."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@ROTARY
def test_cost(rotary):
    """Recording two layers of a BERT-base takes under 2 % of the processor instructions of a forward of 4 x 128 tokens.

    It adds no tensor operation but views, and some Python, which does not depend on the width of the model. One of
    Python's instructions, with the C code that it calls, is taken for 1000 of the processor's. A forward needs at least
    one instruction for 32 floating-point operations: AVX-512 multiplies and adds 16 numbers at once.
    """
    model, batch = make("bert", 12, 24, **NO_DROPOUT).train(), batch_of()

    def step(recorder: record_qkv | None) -> None:
        output = model(**batch)[0]
        if recorder:
            recorder.pop()
        output.sum().backward()
        model.zero_grad()

    def forward(recorder: record_qkv | None) -> None:
        model(**batch)
        if recorder:
            recorder.pop()

    counts = []
    for layers in (None, [6, -1]):
        with record_qkv(model, layers, rotary) if layers else contextlib.nullcontext() as recorder:
            forward(recorder)
            with Operations() as operations:
                step(recorder)
            counts.append((operations.counts, bytecodes(lambda recorder=recorder: forward(recorder))))
    (plain, without), (recorded, with_recorder) = counts
    merged = {torch.ops.aten.transpose.int: 6, torch.ops.aten.view.default: 6} if rotary == "after" else {}
    assert recorded - plain == Counter(merged)  # views
    assert not plain - recorded
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        AutoModel.from_config(AutoConfig.for_model("bert"))(torch.ones(4, 128, dtype=torch.long))
    assert flops.get_total_flops() > 8e10
    assert 0 < (with_recorder - without) * 1000 < 0.02 * flops.get_total_flops() / 32


# Errors


def test_a_forward_belongs_to_one_pop():
    model, batch = bert(), batch_of()
    with record_qkv(model) as recorder:
        with pytest.raises(RuntimeError, match=r"layer 3 did not run since the last pop\(\)"):
            recorder.pop()
        model(**batch)
        model(**batch)
        with pytest.raises(RuntimeError, match=r"layer 3 ran more than once since the last pop\(\)"):
            recorder.pop()
        with pytest.raises(RuntimeError, match="did not run"):
            recorder.pop()
        model(**batch)
        recorder.clear()
        model(**batch)
        first = recorder.pop()[-1]
        model(input_ids=batch["input_ids"].flip(0))
        assert not torch.equal(recorder.pop()[-1].query, first.query)
        with contextlib.suppress(IndexError):
            model(input_ids=batch["input_ids"] + 1000)
        model(**batch)
        recorder.pop()


def test_recordings_are_not_kept():
    model = bert(1)
    with record_qkv(model) as recorder:
        model(**batch_of())
        reference = weakref.ref(recorder.pop()[-1].query)
        gc.collect()
        assert reference() is None
    reference = weakref.ref(recorder)
    del recorder
    gc.collect()
    assert reference() is None


def test_a_forward_without_gradients():
    model, batch = bert(2, hidden_dropout_prob=0.1), batch_of()
    with record_qkv(model) as recorder:
        with torch.no_grad():
            model(**batch)
        with pytest.raises(RuntimeError, match=r"recorded without gradient.*for a teacher, call eval\(\)"):
            recorder.pop()
        model.requires_grad_(False)
        model(**batch)
        with pytest.raises(RuntimeError, match=r"with dropout: call eval\(\) on a teacher"):
            recorder.pop()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(**batch)
        assert not recorder.pop()[-1].query.requires_grad
        model.requires_grad_(True).eval()
        with torch.no_grad():
            model(**batch)
        recorder.pop()


@pytest.mark.parametrize(
    ("model_type", "options", "layers", "message"),
    [
        ("bert", {}, [4], "layer=4: expected 1 to 3, or -3 to -1"),
        ("bert", {}, [0], "layer=0: expected"),
        ("bert", {}, [], "expected at least one number"),
        ("bert", {}, -1, "expected at least one number"),
        ("modernbert", {"pad_token_id": 0}, [2], "layer=2 has sliding_attention"),
        ("bart", {"d_model": 48}, [1], r"several stacks.*'encoder\.layers' .* or .*'decoder\.layers'"),
        ("squeezebert", {"embedding_size": 48}, [1], r"layer=1: encoder\.layers\.0\.attention\.query is a Conv1d"),
        ("xlnet", {"d_model": 48, "n_layer": 3, "n_head": 4}, [1], "no projections with usual names"),
    ],
)
def test_layers_that_cannot_be_recorded(model_type, options, layers, message):
    model = small(model_type, **options)
    with pytest.raises(ValueError, match=message):
        record_qkv(model, layers)
    assert not any("forward" in vars(module) for module in model.modules())


def test_projections_that_return_no_tensor_are_refused():
    model = small("ibert")
    with record_qkv(model) as recorder:
        model(**batch_of())
        with pytest.raises(RuntimeError, match="return \\['tuple', 'tuple', 'tuple'\\]"):
            recorder.pop()


def test_after_without_the_attention_interface():
    with pytest.raises(ValueError, match=r"BertSelfAttention|MPNetSelfAttention\) does not use transformers'"):
        record_qkv(make("mpnet"), rotary="after")
    with pytest.raises(ValueError, match=r"Layer\) does not use transformers' attention interface"):
        record_qkv(Plain(), rotary="after", projections=PLAIN)
    model = bert()
    attention = model.encoder.layer[2].attention.self
    attention.__class__ = type("Other", (type(attention),), {"forward": asks_for_the_name})
    with pytest.raises(ValueError, match="computes something else if its attention function has another name"):
        record_qkv(model, rotary="after")
    assert model.encoder.layer[2].attention.self.config is model.config


def asks_for_the_name(self, hidden_states, **kwargs):
    """A forward as in DeepSeek-V3.2."""
    if self.config._attn_implementation in ("eager", "sdpa"):
        hidden_states = hidden_states + 1
    return hidden_states


def test_other_wrong_arguments():
    model = bert()
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        record_qkv("bert")
    with pytest.raises(TypeError, match="layer: expected an int, got '1'"):
        record_qkv(model, ["1"])
    with pytest.raises(ValueError, match='expected "before" or "after"'):
        record_qkv(model, rotary="behind")
    with pytest.raises(ValueError, match="which a recorder does not support"):
        record_qkv(nn.DataParallel(model))
    with pytest.raises(ValueError, match="accelerate offloads its weights"):
        record_qkv(accelerate.cpu_offload(bert(), torch.device("cpu")))
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="acts in the forward of"):
        record_qkv(peft.get_peft_model(model, config))
