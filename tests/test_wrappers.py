"""Models in wrappers of torch, accelerate, PEFT and sentence-transformers, and with a replaced `forward`."""

import functools
import types

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from sentence_transformers import CrossEncoder, SentenceTransformer
from tokenizers import Tokenizer, models
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from minilm_kernels.losses import QKV
from minilm_kernels.qkv import QKVExtractor

from .test_qkv import assert_equal, batch_of, by_hand, loss_of, make

FROZEN = pytest.mark.parametrize("frozen", [False, True])


def bert(**overrides) -> PreTrainedModel:
    """A model with reproducible weights, so large that changed inputs are visible after LayerNorm."""
    torch.manual_seed(0)
    return make("bert", 2, initializer_range=0.5, **overrides)


def expected_of(batch: dict[str, torch.Tensor]) -> QKV:
    with torch.no_grad():
        return by_hand(bert(), 2, batch)


# Replaced forwards

LEVELS = ["", "encoder", "encoder.layer.0", "encoder.layer.1", "encoder.layer.1.attention.self"]


def closure_method(module: nn.Module, change) -> types.MethodType:
    original = module.forward
    return types.MethodType(lambda self, *args, **kwargs: original(*change(args), **kwargs), module)


def closure(module: nn.Module, change) -> types.FunctionType:
    original = module.forward
    return lambda *args, **kwargs: original(*change(args), **kwargs)


def method(module: nn.Module, change) -> types.MethodType:
    function = type(module).forward
    return types.MethodType(lambda self, *args, **kwargs: function(self, *change(args), **kwargs), module)


def partial(module: nn.Module, change) -> functools.partial:
    function = type(module).forward
    return functools.partial(lambda self, *args, **kwargs: function(self, *change(args), **kwargs), module)


@FROZEN
@pytest.mark.parametrize("path", LEVELS)
@pytest.mark.parametrize("put", [closure_method, closure, method, partial])
def test_a_forward_on_the_instance(put, path, frozen):
    model, batch = bert(), batch_of()
    module = model.get_submodule(path)
    module.forward = put(module, lambda args: args)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    extractor = QKVExtractor(model, frozen=frozen)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert_equal(extractor(**batch), expected_of(batch), 0)
    model.train()
    assert torch.equal(extractor(**batch).query, extractor(**batch).query) == frozen


@FROZEN
@pytest.mark.parametrize("path", LEVELS[1:])
@pytest.mark.parametrize("put", [closure_method, closure, method, partial])
def test_a_forward_that_computes_something_else_is_kept_or_refused(put, path, frozen):
    model, batch = bert(), batch_of()
    module = model.get_submodule(path)
    module.forward = put(module, lambda args: (args[0] * 2 + 1, *args[1:]))
    seen = []
    handle = model.encoder.layer[1].attention.self.query.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch)
    handle.remove()
    copied = frozen or path != "encoder.layer.0"  # otherwise the layer is shared and runs unchanged
    if put in (closure_method, closure) and copied:
        with pytest.raises(RuntimeError, match=f"replaced forward of {path} changes"):
            QKVExtractor(model, frozen=frozen)
        return
    found = QKVExtractor(model, frozen=frozen)(**batch)
    projections = model.encoder.layer[1].attention.self
    assert_equal(found, QKV(*(projections.get_submodule(name)(seen[0]) for name in QKV._fields)), 0)
    assert (found.query - expected_of(batch).query).abs().max() > 1e-3


# torch


@FROZEN
@pytest.mark.parametrize("form", ["whole", "encoder", "layers", "in place"])
def test_compiled_models(form, frozen):
    model, batch = bert(), batch_of()
    compiled = functools.partial(torch.compile, backend="eager")
    if form == "whole":
        model = compiled(model)
    elif form == "encoder":
        model.encoder = compiled(model.encoder)
    elif form == "layers":
        for i, layer in enumerate(model.encoder.layer):
            model.encoder.layer[i] = compiled(layer)
    else:
        for module in (model, *model.encoder.layer):
            module.compile(backend="eager")
    with torch.no_grad():
        assert_equal(QKVExtractor(model, frozen=frozen)(**batch), expected_of(batch))


def test_compiled_models_with_named_projections():
    model, batch = bert(), batch_of()
    model.encoder = torch.compile(model.encoder, backend="eager")
    names = [f"encoder._orig_mod.layer.{{i}}.attention.self.{name}" for name in QKV._fields]
    assert names[0].replace("{i}", "1") in dict(model.named_modules())
    assert_equal(QKVExtractor(model, projections=names)(**batch), expected_of(batch))


def test_an_average_of_weights():
    average, batch = AveragedModel(bert()), batch_of()
    assert_equal(QKVExtractor(average, frozen=True)(**batch), expected_of(batch), 0)
    assert_equal(QKVExtractor(torch.compile(average, backend="eager"))(**batch), expected_of(batch), 0)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "wrap the extractor in DistributedDataParallel"),
        (Wrapper, "Wrapper is a wrapper. Create the extractor from model.module"),
        (lambda model: torch.jit.script(nn.Linear(2, 2)), "compiled and cannot be divided"),
    ],
)
def test_wrappers_that_are_refused(wrap, message):
    with pytest.raises(ValueError, match=message):
        QKVExtractor(wrap(bert()))


# accelerate


@pytest.fixture
def accelerator():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # another test may have left a state
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@FROZEN
def test_prepared_for_mixed_precision(accelerator, frozen):
    batch = batch_of()
    model = accelerator.prepare_model(bert(), evaluation_mode=True)
    assert "_original_forward" in vars(model)
    found, expected = QKVExtractor(model, frozen=frozen)(**batch), expected_of(batch)
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() < 2**-6 * y.abs().max()  # bfloat16 has 8 bits; two layers add errors
    if not frozen:
        loss_of(found).backward()
        assert model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@FROZEN
def test_dispatched_over_devices(frozen):
    batch = batch_of()
    places = dict.fromkeys(["embeddings", "encoder.layer.0", "encoder.layer.1", "pooler"], "cpu")
    model = accelerate.dispatch_model(bert(), places, force_hooks=True)
    assert "_old_forward" in vars(model)
    assert_equal(QKVExtractor(model, frozen=frozen)(**batch), expected_of(batch), 0)
    everywhere = bert()
    for module in everywhere.modules():
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    extractor = QKVExtractor(everywhere, frozen=frozen)
    assert_equal(extractor(**batch), expected_of(batch), 0)
    assert extractor.unused_parameters() == QKVExtractor(bert()).unused_parameters()


def test_offloaded_models_are_refused():
    with pytest.raises(ValueError, match="accelerate offloads its weights"):
        QKVExtractor(accelerate.cpu_offload(bert(), torch.device("cpu")), frozen=True)


# PEFT


def adapted(**options) -> nn.Module:
    model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query", "value"], lora_dropout=0.5), **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def adapted_values(wrapped: nn.Module, batch: dict[str, torch.Tensor]) -> QKV:
    with torch.no_grad():
        return by_hand(wrapped.base_model.model, 2, batch)


@FROZEN
@pytest.mark.parametrize("mixed", [False, True])
def test_adapters_are_applied_and_trained(mixed, frozen):
    wrapped, batch = adapted(mixed=mixed).eval(), batch_of()
    inner = wrapped.base_model.model
    expected = adapted_values(wrapped, batch)
    assert (expected.query - expected_of(batch).query).abs().max() > 0.1
    extractor = QKVExtractor(wrapped, frozen=frozen)
    assert extractor.model is inner
    assert_equal(extractor(**batch), expected, 0)
    if frozen:
        wrapped.train()  # turns on the dropout of the adapters
        assert_equal(extractor(**batch), expected, 0)
        return
    loss_of(extractor(**batch)).backward()
    adapters = {id(p): p for name, p in wrapped.named_parameters() if "lora_" in name}
    assert len(adapters) == 8
    assert all(p.grad is not None for p in adapters.values())
    assert adapters.keys() <= {id(p) for p in extractor.parameters()}


@FROZEN
def test_switching_adapters_is_followed(frozen):
    wrapped, batch = adapted().eval(), batch_of()
    extractor, adapters = QKVExtractor(wrapped, frozen=frozen), adapted_values(wrapped, batch)
    with wrapped.disable_adapter():
        assert_equal(extractor(**batch), expected_of(batch), 0)
    assert_equal(extractor(**batch), adapters, 0)
    wrapped.add_adapter("other", peft.LoraConfig(target_modules=["query", "value"]))
    extractor = QKVExtractor(wrapped, frozen=frozen)
    wrapped.set_adapter("other")  # new adapters have no effect
    assert_equal(extractor(**batch), expected_of(batch), 0)
    wrapped.set_adapter("default")
    assert_equal(extractor(**batch), adapters, 0)


@pytest.mark.parametrize(
    "config",
    [
        peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
        peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
    ],
)
def test_adapters_that_work_in_the_forward_of_the_wrapper_are_refused(config):
    with pytest.raises(ValueError, match=f"adapter 'default' \\({config.peft_type.value}\\) acts in the forward of"):
        QKVExtractor(peft.get_peft_model(bert(), config))


# sentence-transformers


@pytest.fixture
def folder(tmp_path):
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(100))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_sentence_transformers(folder):
    bert().save_pretrained(folder)
    sentences, batch = SentenceTransformer(str(folder), device="cpu"), batch_of()
    for model in (sentences, sentences[0], sentences[0].model):
        assert_equal(QKVExtractor(model, frozen=True)(**batch), expected_of(batch), 0)
    features = sentences.preprocess(["w1", "w2"])
    assert "modality" in features
    assert QKVExtractor(sentences)(**features).query.shape == (2, 1, 48)
    with pytest.raises(ValueError, match=r"st\[0\]\.model"):
        QKVExtractor(sentences[1])


def test_cross_encoders(folder):
    make("bert", 2, auto=AutoModelForSequenceClassification).save_pretrained(folder)
    encoder, batch = CrossEncoder(str(folder), device="cpu"), batch_of()
    with torch.no_grad():
        assert_equal(QKVExtractor(encoder)(**batch), by_hand(encoder[0].model.base_model, 2, batch), 0)
