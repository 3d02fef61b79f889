"""QKVExtractor: values, modules that run, registered parameters, and the unchanged model."""

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from examples.demo.assets import minilm_l6
from minilm_kernels.losses import MiniLMv2Loss
from minilm_kernels.qkv import QKV, QKVExtractor
from minilm_kernels.students import copied_student, student_config

from .processes import run_two

BERT = ("encoder.layer", "attention.self", ("query", "key", "value"))
# List of layers, attention module and projections, independent of the package's table.
PARTS = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "electra": BERT,
    "distilbert": ("transformer.layer", "attention", ("q_lin", "k_lin", "v_lin")),
    "mpnet": ("encoder.layer", "attention.attn", ("q", "k", "v")),
}
KNOWN = list(PARTS)
# Families with BERT's module names, and settings for their small configs.
LIKE_BERT = {
    "camembert": {},
    "data2vec-text": {},
    "ernie": {},
    "megatron-bert": {},
    "rembert": {"input_embedding_size": 24},
    "roberta-prelayernorm": {},
    "splinter": {},
    "xlm-roberta-xl": {},
    "xmod": {"default_language": "en_XX"},
}
LLAMA = [f"layers.{{i}}.self_attn.{p}_proj" for p in "qkv"]


def make(model_type: str, layers: int = 3, hidden: int = 48, auto=AutoModel, **overrides) -> PreTrainedModel:
    config = student_config(AutoConfig.for_model(model_type), layers, hidden, vocab_size=200, **overrides)
    return auto.from_config(config).eval()


def make_rotary(model_type: str = "llama", layers: int = 3, attention: str = "sdpa", **overrides) -> PreTrainedModel:
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    config = AutoConfig.for_model(
        model_type, vocab_size=200, num_hidden_layers=layers, intermediate_size=64, **(sizes | overrides)
    )
    return AutoModel.from_config(config, attn_implementation=attention).eval()


def batch_of(size: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    """A batch with left padding, right padding, and padding in between."""
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    mask[1, :3] = 0
    mask[2, 4] = 0
    return {"input_ids": torch.randint(5, 200, (size, length)), "attention_mask": mask}


def projections_of(base: PreTrainedModel, layer: int) -> list[nn.Module]:
    layers, attention, names = PARTS[base.config.model_type]
    return [base.get_submodule(f"{layers}.{layer - 1}.{attention}.{name}") for name in names]


def by_hand(base: PreTrainedModel, layer: int, batch: dict[str, torch.Tensor]) -> QKV:
    hidden = base(**batch, output_hidden_states=True).hidden_states[layer - 1]
    return QKV(*(projection(hidden) for projection in projections_of(base, layer)))


def assert_equal(actual: QKV, expected: QKV, atol: float = 1e-6) -> None:
    assert isinstance(actual, QKV)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=atol)


def loss_of(qkv: QKV) -> torch.Tensor:
    return sum(x.square().mean() for x in qkv)


# Values


@pytest.mark.parametrize(("model_type", "hidden"), [*((m, 384) for m in KNOWN), ("bert", 768)])
def test_values_are_those_recomputed_from_the_hidden_states(model_type, hidden):
    model, batch = make(model_type, 3, hidden), batch_of()
    found = {}
    with torch.no_grad():
        for layer in (1, 2, 3):
            found[layer] = QKVExtractor(model, layer)(**batch)
            assert_equal(found[layer], by_hand(model, layer, batch))
            assert found[layer].value.shape == (3, 11, hidden)
        assert_equal(QKVExtractor(model)(**batch), found[3], 0)
        assert_equal(QKVExtractor(model, -2)(**batch), found[2], 0)
        assert_equal(QKVExtractor(model, -3)(**batch), found[1], 0)
    # Detects layers counted from 0, and a lost padding mask.
    assert (found[1].query - found[2].query).abs().max() > 0.01
    with torch.no_grad():
        unmasked = QKVExtractor(model)(input_ids=batch["input_ids"])
    assert (unmasked.query - found[3].query).abs().max() > 1e-4


@pytest.mark.parametrize("model_type", LIKE_BERT)
def test_families_with_the_names_of_bert(model_type):
    model, batch = make(model_type, **LIKE_BERT[model_type]), batch_of()
    attention, expected = model.encoder.layer[1].attention.self, {}
    with torch.no_grad():
        handles = [
            attention.get_submodule(name).register_forward_hook(lambda _, __, y, n=name: expected.update({n: y}))
            for name in QKV._fields
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
        assert_equal(QKVExtractor(model, 2)(**batch), QKV(**expected), 0)
        assert QKVExtractor(copied_student(model, [1, 3]))(**batch).query.shape == (3, 11, 48)


def test_values_on_a_real_minilm():
    folder = minilm_l6()
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = dict(
        tokenizer(["Relations of values.", "A longer sentence, of more words."], padding=True, return_tensors="pt")
    )
    with torch.no_grad():
        for layer in (1, 4, 6):
            assert_equal(QKVExtractor(model, layer)(**batch), by_hand(model, layer, batch), 1e-5)


BERT_LIKE = {
    "bert-generation": {},
    "camembert": {},
    "data2vec-text": {},
    "ernie": {},
    "esm": {"pad_token_id": 1, "mask_token_id": 4},
    "layoutlm": {},
    "markuplm": {},
    "megatron-bert": {},
    "rembert": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "roberta-prelayernorm": {},
    "roc_bert": {},
    "splinter": {},
    "xlm-roberta-xl": {},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


@pytest.mark.parametrize("model_type", KNOWN)
def test_gradients_are_those_recomputed_from_the_hidden_states(model_type):
    """Query, key and value each train the layers before them."""
    model, batch = make(model_type, 2), batch_of()
    extractor = QKVExtractor(model)
    parameters = list(extractor.parameters())
    for i in range(3):
        found, expected = (
            torch.autograd.grad(qkv[i].square().mean(), parameters, allow_unused=True, materialize_grads=True)
            for qkv in (extractor(**batch), by_hand(model, 2, batch))
        )
        torch.testing.assert_close(found, expected)
        assert sum(bool(gradient.any()) for gradient in found) > len(parameters) / 2


@pytest.mark.parametrize("model_type", BERT_LIKE)
def test_values_are_those_of_the_whole_model(model_type):
    """Architectures with BERT's names, compared with hooks in the whole model."""
    shape = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 64}
    config = AutoConfig.for_model(
        model_type, vocab_size=200, max_position_embeddings=40, **shape, **BERT_LIKE[model_type]
    )
    model, batch, seen = AutoModel.from_config(config).eval(), batch_of(), {}
    for layer in range(3):
        for name in BERT[2]:
            module = model.get_submodule(f"encoder.layer.{layer}.attention.self.{name}")
            module.register_forward_hook(lambda m, i, output, key=(layer + 1, name): seen.update({key: output}))
    with torch.no_grad():
        model(**batch)
        expected = {layer: QKV(*(seen[layer, name] for name in BERT[2])) for layer in (1, 3)}
        for layer, qkv in expected.items():
            assert_equal(QKVExtractor(model, layer)(**batch), qkv)


@pytest.mark.parametrize("model_type", KNOWN)
@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_below_a_task_head(model_type, auto):
    model, batch = make(model_type, auto=auto), batch_of()
    extractor = QKVExtractor(model, 2)
    with torch.no_grad():
        assert_equal(extractor(**batch, labels=torch.tensor([0, 1, 0])), by_hand(model.base_model, 2, batch))
    unreached = extractor.unused_parameters()
    inside = {id(p) for p in model.base_model.parameters()}
    head = [name for name, p in model.named_parameters() if id(p) not in inside]
    assert head
    assert set(head) <= set(unreached)
    tied = {name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight}
    assert not tied & set(unreached)


def test_token_type_ids_are_used_or_not_needed():
    batch = batch_of()
    types = torch.ones_like(batch["input_ids"])
    bert = QKVExtractor(make("bert"))
    roberta, mpnet = QKVExtractor(make("roberta", type_vocab_size=1)), QKVExtractor(make("mpnet"))
    assert not torch.equal(bert(**batch).key, bert(**batch, token_type_ids=types).key)
    assert torch.isfinite(roberta(**batch).key).all()
    assert_equal(mpnet(**batch, token_type_ids=types), mpnet(**batch), 0)


@pytest.mark.parametrize(
    "name", ["labels", "offset_mapping", "overflow_to_sample_mapping", "modality", "prompt_length"]
)
def test_entries_for_others_are_ignored(name):
    extractor, batch = QKVExtractor(make("bert", 1)), batch_of()
    assert_equal(extractor(**batch, **{name: object()}), extractor(**batch), 0)


# Modules that run


def executed(model: nn.Module, call) -> set[str]:
    names: set[str] = set()
    handles = [m.register_forward_pre_hook(lambda *_, n=n: names.add(n)) for n, m in model.named_modules()]
    call()
    for handle in handles:
        handle.remove()
    return names


@pytest.mark.parametrize("model_type", KNOWN)
@pytest.mark.parametrize("layer", [1, 2])
def test_nothing_behind_the_projections_is_run(model_type, layer):
    model, batch = make(model_type), batch_of()
    extractor = QKVExtractor(model, layer)
    layers, attention, names = PARTS[model_type]
    chosen = f"{layers}.{layer - 1}"
    last = {f"{chosen}.{attention}.{name}" for name in names}
    containers = {n for n, _ in model.named_modules() if any(f"{path}.".startswith(f"{n}.") for path in last)}

    def expected(name: str) -> bool:
        if name.startswith(f"{layers}."):
            return int(name[len(layers) + 1 :].partition(".")[0]) < layer - 1 or name in containers
        return not name.startswith("pooler")

    everything = executed(model, lambda: model(**batch))
    assert executed(model, lambda: extractor(**batch)) == {name for name in everything if expected(name)}
    assert len([name for name in everything if not expected(name)]) > 10
    assert len(extractor.base.get_submodule(layers)) == layer


# Registered parameters


@pytest.mark.parametrize("model_type", KNOWN)
@pytest.mark.parametrize("layer", [1, 3])
def test_parameters_are_exactly_those_that_get_a_gradient(model_type, layer):
    model = make(model_type, auto=AutoModelForMaskedLM)
    extractor = QKVExtractor(model, layer)
    loss_of(extractor(**batch_of())).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert extractor.unused_parameters() == without
    assert {id(p) for p in extractor.parameters()} == {id(p) for p in model.parameters() if p.grad is not None}
    bias = [name for name in without if "relative_attention_bias" in name]
    assert bool(bias) == (model_type == "mpnet" and layer == 1)


def test_frozen_parameters_stay_frozen_and_registered():
    model = make("electra", embedding_size=16)
    model.embeddings.requires_grad_(False)
    extractor = QKVExtractor(model)
    loss_of(extractor(**batch_of())).backward()
    assert all(not p.requires_grad and p.grad is None for p in model.embeddings.parameters())
    assert {id(p) for p in model.embeddings.parameters()} <= {id(p) for p in extractor.parameters()}
    assert model.embeddings_project.weight.grad is not None
    assert not any(name.startswith("embeddings") for name in extractor.unused_parameters())


def snapshot(model: PreTrainedModel) -> dict:
    """All attributes of all modules, as comparable values: entries of dicts, contents of tensors; and the config."""
    attributes = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            entries = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else None
            attributes[name, key] = (id(value), entries, value if isinstance(value, bool) else None)
    tensors = {name: t.clone() for name, t in [*model.state_dict().items(), *model.named_buffers()]}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"attributes": attributes, "flags": flags, "config": model.config.to_dict(), "tensors": tensors}


@pytest.mark.parametrize("model_type", KNOWN)
@pytest.mark.parametrize("rotary", ["before", "after"])
def test_the_model_is_left_as_it_was(model_type, rotary):
    if rotary == "after":
        model = make_rotary()
        options = {"projections": LLAMA, "rotary": "after"}
    else:
        model, options = make(model_type), {}
    batch = batch_of()
    model.train()
    next(iter(model.children())).eval()  # a mixed mode, which must be kept
    next(model.parameters()).requires_grad_(False)
    model.config.output_hidden_states = True  # transformers would install hooks to record them
    hooked = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: hooked.append(1))
        module.register_forward_hook(lambda *_: hooked.append(1))
    before, state = snapshot(model), torch.get_rng_state()
    extractor = QKVExtractor(model, 2, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert not hooked
    extractor(**batch)
    with pytest.raises(IndexError):
        extractor(input_ids=batch["input_ids"] + 1000)
    after = snapshot(model)
    tensors = before.pop("tensors")
    torch.testing.assert_close(after.pop("tensors"), tensors, rtol=0, atol=0)
    assert after == before
    torch.manual_seed(1)
    first = extractor(**batch)
    torch.manual_seed(1)
    assert_equal(extractor(**batch), first, 0)


def run_in_threads(work: Callable[[int], None], count: int) -> None:
    """Runs `work(i)` for i = 0, 1, ... in threads, and waits for them."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not any(thread.is_alive() for thread in threads)


def test_extractors_over_one_model_and_threads_do_not_disturb_each_other():
    model = make("bert", 4)
    extractors = [QKVExtractor(model, layer) for layer in (1, 2, 3, 4)]
    batches = [batch_of(length=length) for length in (5, 9, 13, 17)]
    with torch.no_grad():
        expected = [by_hand(model, i + 1, batches[i]) for i in range(4)]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                for j in (i, (i + 1) % 4):
                    found = extractors[j](**batches[j])
                    if any((a - b).abs().max() > 1e-6 for a, b in zip(found, expected[j], strict=True)):
                        wrong.append(j)

    run_in_threads(work, 4)
    assert not wrong


# Modes, devices, copies


def test_training_mode_is_shared_and_its_dropout_active():
    model, batch = make("roberta"), batch_of()
    extractor = QKVExtractor(model)
    assert not extractor.training
    assert_equal(extractor(**batch), extractor(**batch), 0)
    extractor.train()
    assert all(module.training for module in [*model.modules(), *extractor.modules()])
    torch.manual_seed(3)
    found = extractor(**batch)
    torch.manual_seed(3)
    assert_equal(found, by_hand(model, 3, batch))
    assert not torch.equal(found.query, extractor(**batch).query)
    model.eval()
    assert_equal(extractor(**batch), extractor(**batch), 0)
    model.train()
    extractor.eval()
    assert not any(module.training for module in [*model.modules(), *extractor.modules()])


def test_autocast():
    model, batch = make("bert"), batch_of()
    extractor = QKVExtractor(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = extractor(**batch), by_hand(model, 3, batch)
    assert found.query.dtype == torch.bfloat16
    assert_equal(found, expected, 0)
    loss_of(found).backward()
    assert model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing_enable:FutureWarning"
)  # transformers 5.17 lacks the method that replaces it
@pytest.mark.parametrize("model_type", [*(m for m in KNOWN if m != "mpnet"), "llama"])  # MPNet has no checkpointing
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("enabled_first", [True, False])
def test_gradient_checkpointing(model_type, reentrant, enabled_first):
    model, batch = (make(model_type) if model_type in KNOWN else make_rotary()).train(), batch_of()
    options = {} if model_type in KNOWN else {"projections": LLAMA}
    first = f"{PARTS[model_type][0]}.0.{PARTS[model_type][1]}" if model_type in KNOWN else "layers.0.self_attn"
    extractor = QKVExtractor(model, **options)

    def gradients() -> tuple[dict, int]:
        model.zero_grad()
        torch.manual_seed(5)
        runs = []
        handle = model.get_submodule(first).register_forward_pre_hook(lambda *_: runs.append(1))
        loss_of(extractor(**batch)).backward()
        handle.remove()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(runs)

    expected, once = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if enabled_first:
        extractor = QKVExtractor(model, **options)
    found, twice = gradients()
    assert (once, twice) == (1, 2)  # the first layer was recomputed
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_moving_and_casting_are_seen_on_both_sides():
    model, batch = make("mpnet", 1), batch_of()
    extractor = QKVExtractor(model)
    model.double()
    assert_equal(extractor(**batch), by_hand(model, 1, batch), 1e-12)
    assert extractor(**batch).query.dtype == torch.float64
    extractor.to(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # including parameters that are not reached
    assert_equal(extractor(**batch), by_hand(model, 1, batch))
    extractor.to("meta")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}


@pytest.mark.slow
def test_a_pickle_with_rotary_after_works_in_another_process(tmp_path):
    """Unpickling an extractor registers its attention function with transformers."""
    config = AutoConfig.for_model("llama", vocab_size=20, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    extractor = QKVExtractor(AutoModel.from_config(config).eval(), rotary="after", projections=LLAMA)
    ids = torch.arange(6)[None]
    expected = [x.detach() for x in extractor(input_ids=ids)]
    (tmp_path / "extractor.pkl").write_bytes(pickle.dumps((extractor, expected)))
    code = """
import pickle, sys, torch
extractor, expected = pickle.load(open(sys.argv[1], "rb"))
assert all(map(torch.equal, extractor(input_ids=torch.arange(6)[None]), expected))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "extractor.pkl")]
    subprocess.run(command, check=True, timeout=600)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
@pytest.mark.parametrize("rotary", [False, True])
def test_copies_are_whole_and_independent(copied, rotary):
    model, batch = make_rotary() if rotary else make("mpnet", 1), batch_of()
    extractor = QKVExtractor(model, **({"projections": LLAMA, "rotary": "after"} if rotary else {}))
    with torch.no_grad():
        expected = extractor(**batch)
        twin = copied(extractor)
        assert_equal(twin(**batch), expected, 0)
        assert twin.unused_parameters() == extractor.unused_parameters()
        inside = {id(p) for p in twin.model.parameters()}
        assert {id(p) for p in twin.parameters()} <= inside
        assert not inside & {id(p) for p in model.parameters()}
        for p in twin.parameters():
            p.add_(1)
        assert_equal(extractor(**batch), expected, 0)
        assert not torch.equal(twin(**batch).query, expected.query)


def test_modes_of_containers_follow_the_model():
    """BART's encoder and layers apply dropout depending on the mode of containers, which the view copies."""
    sizes = {
        "d_model": 48,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_layers": 1,
    }
    model = AutoModel.from_config(AutoConfig.for_model("bart", vocab_size=200, dropout=0.5, **sizes)).eval()
    names = [f"encoder.layers.{{i}}.self_attn.{p}_proj" for p in "qkv"]
    extractor, batch = QKVExtractor(model, projections=names), batch_of()
    expected = extractor(**batch)
    extractor.train()
    model.eval()
    assert_equal(extractor(**batch), expected, 0)
    model.train()
    assert not torch.equal(extractor(**batch).query, extractor(**batch).query)


# Frozen teachers


class Distiller(nn.Module):
    """A module with teacher and student, as users write it."""

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, whole_teacher: bool = False):
        super().__init__()
        self.teacher, self.student = QKVExtractor(teacher, frozen=True), QKVExtractor(student)
        if whole_teacher:
            self.model = teacher
        self.loss = MiniLMv2Loss(12)

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.loss(self.teacher(**batch), self.student(**batch), batch["attention_mask"])


@pytest.mark.parametrize("whole_teacher", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "mpnet", "electra"])
def test_a_frozen_teacher_does_not_follow_train(model_type, whole_teacher):
    teacher, batch = make(model_type, hidden_dropout_prob=0.5).train(), batch_of()
    distiller = Distiller(teacher, make(model_type), whole_teacher)
    assert teacher.training
    distiller.train()
    distiller.teacher.train()
    if whole_teacher:
        assert teacher.training
    assert not distiller.teacher.training
    target = distiller.teacher(**batch)
    with torch.no_grad():
        assert_equal(target, by_hand(teacher.eval(), 3, batch))
    teacher.train()
    assert_equal(distiller.teacher(**batch), target, 0)
    assert MiniLMv2Loss(12)(target, distiller.teacher(**batch), batch["attention_mask"]).item() == 0
    assert not any(x.requires_grad for x in target)
    distiller(**batch).backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("rotary", ["before", "after"])
def test_a_frozen_teacher_of_a_rotary_model(rotary):
    teacher, batch = make_rotary(attention_dropout=0.5), batch_of()
    options = {"projections": LLAMA, "rotary": rotary}
    expected = QKVExtractor(teacher, **options)(**batch)
    frozen = QKVExtractor(teacher, frozen=True, **options)
    teacher.train()
    assert_equal(frozen(**batch), expected, 0)
    assert frozen.unused_parameters() == QKVExtractor(teacher, **options).unused_parameters()


def test_a_frozen_teacher_is_no_part_of_what_is_trained_and_saved(tmp_path):
    teacher, student, batch = make("bert"), make("bert"), batch_of()
    modes, flags = teacher.training, [p.requires_grad for p in teacher.parameters()]
    distiller = Distiller(teacher, student)
    inside = {id(p) for p in student.parameters()}
    assert {id(p) for p in distiller.parameters()} <= inside
    assert {id(b) for b in distiller.buffers()} <= {id(b) for b in student.buffers()}
    assert not [name for name in distiller.state_dict() if not name.startswith("student.")]
    assert [name for name, _ in distiller.named_modules() if name.startswith("teacher")] == ["teacher"]
    save_file(distiller.state_dict(), tmp_path / "model.safetensors")
    distiller.load_state_dict(load_file(tmp_path / "model.safetensors"))
    distiller.requires_grad_(True)
    distiller.apply(lambda module: nn.init.zeros_(module.weight) if isinstance(module, nn.Linear) else None)
    assert (teacher.training, [p.requires_grad for p in teacher.parameters()]) == (modes, flags)
    assert not any((p == 0).all() for name, p in teacher.named_parameters() if name.endswith("dense.weight"))

    target = distiller.teacher(**batch)
    for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        assert_equal(twin.teacher(**batch), target, 0)
        assert twin.teacher.model is not teacher
        assert twin.teacher.unused_parameters() == distiller.teacher.unused_parameters()
    distiller.double()
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}
    assert distiller.teacher(**batch).query.dtype == torch.float64
    with torch.no_grad():
        teacher.embeddings.LayerNorm.bias.add_(1)  # weights are shared, so the extractor uses the change
    assert not torch.equal(distiller.teacher(**batch).query.float(), target.query)


def test_inference_mode():
    batch = batch_of()
    with torch.inference_mode():
        made = make("bert")
        expected = by_hand(made, 3, batch)
        for frozen in (True, False):
            assert_equal(QKVExtractor(made, frozen=frozen)(**batch), expected, 0)
            assert QKVExtractor(make("bert"), frozen=frozen)(**batch).value.shape == (3, 11, 48)
        tokens = {name: x.clone() for name, x in batch.items()}
    model = make("bert")
    with torch.inference_mode():
        trained = QKVExtractor(model, example=tokens)
    assert_equal(QKVExtractor(made, frozen=True)(**batch), expected, 0)
    assert_equal(QKVExtractor(made, frozen=True, example=tokens)(**tokens), expected, 0)
    with torch.no_grad():
        assert_equal(QKVExtractor(made)(**batch), expected, 0)
    loss_of(trained(**batch)).backward()
    assert trained.unused_parameters() == [n for n, p in model.named_parameters() if p.grad is None]


def trained_by_trainer(folder, size: int, accumulation: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weight changes in two steps of 32 sequences, with labels as from masked-LM collators."""
    torch.manual_seed(0)
    teacher, student = make("bert", 2), make("bert", 1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    target, before = QKVExtractor(teacher, frozen=True), copy.deepcopy(student.state_dict())
    ids = torch.randint(5, 200, (64, 7))
    data = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]

    class RelationTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return MiniLMv2Loss(12)(target(**inputs), model(**inputs), inputs["attention_mask"])

    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
    quiet = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    arguments = TrainingArguments(
        folder, optim="sgd", learning_rate=100.0, max_grad_norm=0, remove_unused_columns=False, **sizes, **quiet
    )
    trainer = RelationTrainer(QKVExtractor(student), arguments, train_dataset=data)
    trainer.train()
    moved = {name: weight - before[name] for name, weight in student.state_dict().items()}
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], moved


def test_accumulation_in_the_trainer_of_transformers(tmp_path):
    losses, moved = trained_by_trainer(tmp_path, 32, 1)
    accumulated, others = trained_by_trainer(tmp_path, 8, 4)
    assert accumulated == pytest.approx(losses, rel=1e-3)  # the log is rounded
    assert moved["embeddings.word_embeddings.weight"].abs().max() > 1e-3
    torch.testing.assert_close(others, moved, rtol=1e-3, atol=1e-6)  # a float32 weight near 1 has steps of 1e-7


@pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing_enable:FutureWarning"
)  # transformers 5.17 lacks the method that replaces it
def test_checkpointing_can_be_enabled_on_the_extractor():
    model = make("bert")
    QKVExtractor(model).gradient_checkpointing_enable({"use_reentrant": False})
    assert model.encoder.layer[0].gradient_checkpointing


# Reparametrized modules

REPARAMETRISATIONS = {
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "pruned twice": lambda module: [prune.random_unstructured(module, "weight", 0.3) for _ in range(2)],
    "spectral norm by a hook": spectral_norm,
    "weight norm by a hook": weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
}


@pytest.mark.parametrize(
    "path", ["embeddings.word_embeddings", "encoder.layer.0.intermediate.dense", "encoder.layer.1.attention.self.query"]
)
@pytest.mark.parametrize("name", REPARAMETRISATIONS)
@pytest.mark.filterwarnings("ignore:.weight_norm.:FutureWarning")
def test_the_parameters_behind_a_weight_are_trained(name, path):
    model, batch = make("bert", 2), batch_of()
    REPARAMETRISATIONS[name](model.get_submodule(path))
    model.eval()
    expected = by_hand(model, 2, batch)
    extractor = QKVExtractor(model)
    assert_equal(extractor(**batch), expected, 0)
    assert_equal(QKVExtractor(model, frozen=True)(**batch), expected, 0)
    loss_of(extractor(**batch)).backward()
    registered = {id(p) for p in extractor.parameters()}
    assert registered == {id(p) for p in model.parameters() if p.grad is not None}
    assert {id(p) for p in model.get_submodule(path).parameters()} <= registered
    assert extractor.unused_parameters() == [n for n, p in model.named_parameters() if p.grad is None]


# torch.compile and DistributedDataParallel


@pytest.mark.parametrize(
    "model_type",
    ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in [*KNOWN, "llama"] if name != "bert")],
)
def test_compiles_to_one_graph_with_dynamic_shapes(model_type):
    torch._dynamo.reset()
    layers = 2 if model_type == "bert" else 1
    if model_type in KNOWN:
        model, options = make(model_type, layers), {}
    else:
        model, options = make_rotary(layers=layers), {"projections": LLAMA, "rotary": "after"}
    extractor = QKVExtractor(model, **options)
    # Only tracing can fail here; a code generator would add compile time.
    backend = "aot_eager" if model_type == "bert" else "eager"
    compiled = torch.compile(extractor, fullgraph=True, dynamic=True, backend=backend)
    for length, stance in ((11, "default"), (19, "fail_on_recompile")):
        batch = batch_of(length=length)
        with torch.compiler.set_stance(stance):
            found, expected = compiled(**batch), extractor(**batch)
            assert_equal(found, expected)
            parameters = list(extractor.parameters())
            torch.testing.assert_close(
                torch.autograd.grad(loss_of(found), parameters), torch.autograd.grad(loss_of(expected), parameters)
            )


def test_frozen_compiles_to_one_graph():
    torch._dynamo.reset()
    teacher, batch = make("bert", 1), batch_of()
    frozen = QKVExtractor(teacher, frozen=True)
    compiled = torch.compile(frozen, fullgraph=True, dynamic=True, backend="eager")
    assert_equal(compiled(**batch), frozen(**batch), 0)
    teacher.train()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_equal(compiled(**batch), frozen(**batch), 0)


DISTRIBUTED = {"bert": 2, "mpnet": 1}  # model type -> layer


def train_distributed(rank: int, folder: str) -> None:
    parallel = nn.parallel.DistributedDataParallel
    for model_type, layer in DISTRIBUTED.items():
        torch.manual_seed(0)
        model, batch = make(model_type, auto=AutoModelForMaskedLM), batch_of(6)
        extractor = parallel(QKVExtractor(model, layer))
        for _ in range(3):  # a parameter without gradient would be an error in the second step
            model.zero_grad()
            loss_of(extractor(**{name: x[3 * rank : 3 * rank + 3] for name, x in batch.items()})).backward()
        torch.save({n: p.grad for n, p in model.named_parameters()}, f"{folder}/{model_type}{rank}.pt")

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model, batch = make("bert"), batch_of(6)
    sharded = QKVExtractor(model)
    for part in (*list(sharded.base.encoder.layer)[:-1], sharded):
        fully_shard(part, mesh=mesh)
    with pytest.raises(ValueError, match="Create the extractor first"):
        QKVExtractor(model)
    loss_of(sharded(**{name: x[3 * rank : 3 * rank + 3] for name, x in batch.items()})).backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    torch.save(gradients, f"{folder}/sharded{rank}.pt")

    torch.manual_seed(0)
    model, batch = make("mpnet", auto=AutoModelForMaskedLM), batch_of(6)
    with pytest.raises(ValueError, match="wrap the extractor"):
        QKVExtractor(parallel(model))
    whole = QKVExtractor(model, layer)
    whole.register_module("everything", model)  # the wrong variant, which the steps above would report
    wrong = parallel(whole)
    loss_of(wrong(**batch)).backward()
    with pytest.raises(RuntimeError, match="not used in producing loss"):
        wrong(**batch)


@pytest.mark.slow
def test_distributed_without_find_unused_parameters(tmp_path):
    run_two(train_distributed, tmp_path)
    for model_type, layer in DISTRIBUTED.items():
        torch.manual_seed(0)
        model, batch = make(model_type, auto=AutoModelForMaskedLM), batch_of(6)
        loss_of(QKVExtractor(model, layer)(**batch)).backward()
        expected = {n: p.grad for n, p in model.named_parameters()}
        for rank in range(2):
            found = torch.load(tmp_path / f"{model_type}{rank}.pt")
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    torch.manual_seed(0)
    model, batch = make("bert"), batch_of(6)
    loss_of(QKVExtractor(model)(**batch)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(torch.load(tmp_path / "sharded0.pt"), expected, rtol=1e-4, atol=1e-7)


# Other models


@pytest.mark.parametrize("prefix", ["", "model."])
def test_named_projections_of_a_grouped_query_model(prefix):
    model, batch = LlamaForCausalLM(make_rotary().config).eval(), batch_of()
    extractor = QKVExtractor(model, 2, projections=[prefix + name for name in LLAMA])
    assert_equal(QKVExtractor(model, 2)(**batch), extractor(**batch), 0)  # the usual names are found
    layer = model.model.layers[1]
    with torch.no_grad():
        hidden = layer.input_layernorm(model(**batch, output_hidden_states=True).hidden_states[1])
        found = extractor(**batch)
        assert_equal(found, QKV(*(getattr(layer.self_attn, f"{p}_proj")(hidden) for p in "qkv")))
    assert [x.shape[-1] for x in found] == [48, 24, 24]
    with pytest.raises(ValueError, match=r"'qk' of teacher.key of width 24 and teacher.query of width 48 needs"):
        MiniLMv2Loss(4, relations={"qk": 1.0})(found, found)
    assert MiniLMv2Loss(4)(found, found).item() == pytest.approx(0, abs=1e-6)

    loss_of(extractor(**batch)).backward()
    assert extractor.unused_parameters() == [n for n, p in model.named_parameters() if p.grad is None]
    assert layer.input_layernorm.weight.grad is not None
    assert layer.post_attention_layernorm.weight.grad is None
    ran = executed(model, lambda: extractor(**batch))
    assert "model.layers.1.input_layernorm" in ran
    assert not {"model.norm", "lm_head", "model.layers.1.self_attn.o_proj", "model.layers.2"} & ran


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])  # Qwen3 normalizes query and key before the rotation
def test_rotary_after_gives_the_operands_of_the_model_s_own_scores(model_type):
    model, batch = make_rotary(model_type, attention="eager"), batch_of()
    options = {"projections": LLAMA, "layer": 2}
    with torch.no_grad():
        before = QKVExtractor(model, **options)(**batch)
        found = QKVExtractor(model, **options, rotary="after")(**batch)
        weights = model(**batch, output_attentions=True).attentions[1]
    assert [x.shape for x in found] == [x.shape for x in before]
    assert torch.equal(found.value, before.value)
    query = found.query.view(3, 11, 4, 12).transpose(1, 2)
    key = found.key.view(3, 11, 2, 12).transpose(1, 2).repeat_interleave(2, dim=1)
    visible = torch.ones(11, 11).tril().bool() & batch["attention_mask"].bool()[:, None, None, :]
    scores = (query @ key.mT / 12**0.5).masked_fill(~visible, float("-inf")).softmax(-1)
    rows = visible.any(-1).expand(3, 4, 11)
    torch.testing.assert_close(scores[rows], weights[rows])
    unrotated = before.query.view(3, 11, 4, 12).transpose(1, 2)
    assert ((unrotated @ key.mT / 12**0.5).masked_fill(~visible, float("-inf")).softmax(-1) - weights)[
        rows
    ].abs().max() > 1e-4


class Plain(nn.Module):
    """A plain PyTorch model with embeddings, two layers, and projections with configurable inputs."""

    class Layer(nn.Module):
        def __init__(self, offset: float):
            super().__init__()
            self.norm, self.out, self.offset = nn.LayerNorm(8), nn.Linear(8, 8), offset
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside = self.norm(x)
            return x + self.out(self.v(inside + self.offset) * (self.q(inside) * self.k(inside)).sum(-1, keepdim=True))

    def __init__(self, offset: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.register_buffer("calls", torch.zeros(()))
        self.blocks = nn.Sequential(self.Layer(offset), self.Layer(offset))

    def forward(self, tokens: torch.Tensor, skip: bool = False) -> torch.Tensor:
        self.calls += 1
        return self.embed(tokens) if skip else self.blocks(self.embed(tokens))


PLAIN = [f"blocks.{{i}}.{p}" for p in "qkv"]
TOKENS = torch.tensor([[1, 2, 3]])


def test_a_model_of_one_s_own():
    model = Plain()
    with pytest.raises(ValueError, match="example"):
        QKVExtractor(model, projections=PLAIN)
    extractor = QKVExtractor(model, projections=PLAIN, example={"tokens": TOKENS})
    assert model.calls == 0
    hidden = model.blocks[1].norm(model.blocks[0](model.embed(TOKENS)))
    assert_equal(extractor(tokens=TOKENS), QKV(*(getattr(model.blocks[1], p)(hidden) for p in "qkv")))
    assert model.calls == 1
    assert extractor.unused_parameters() == ["blocks.1.out.weight", "blocks.1.out.bias"]
    with pytest.raises(RuntimeError, match="without reaching"):
        extractor(tokens=TOKENS, skip=True)
    with pytest.raises(RuntimeError, match="did not run"):
        QKVExtractor(model, projections=PLAIN, example={"tokens": TOKENS, "skip": True})
    with pytest.raises(RuntimeError, match="dry run"):
        QKVExtractor(model, projections=PLAIN, example={"tokens": TOKENS + 100})


def test_projections_of_different_inputs_are_refused():
    with pytest.raises(ValueError, match="have different inputs"):
        QKVExtractor(Plain(offset=1.0), projections=PLAIN, example={"tokens": TOKENS})


SMALL = {
    "vocab_size": 200,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
}


@pytest.mark.parametrize(
    ("model_type", "attention", "message"),
    [
        ("ibert", "encoder.layer.{i}.attention.self", r"query \(QuantLinear\) takes 2 arguments and returns a tuple"),
        ("squeezebert", "encoder.layers.{i}.attention", r"query returns \(1, 48, 2\) for tokens of \(1, 2\)"),
    ],
)
def test_projections_that_cannot_be_cut_out_are_refused(model_type, attention, message):
    extra = {"squeezebert": {"embedding_size": 48}}.get(model_type, {})
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **SMALL, **extra))
    with pytest.raises(ValueError, match=message):
        QKVExtractor(model, projections=[f"{attention}.{name}" for name in ("query", "key", "value")])


def test_a_layer_that_a_loop_applies_again_is_refused():
    class Looped(Plain):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens) + self.blocks(self.embed(tokens))

    with pytest.raises(ValueError, match=r"blocks.1.v is applied 2 times"):
        QKVExtractor(Looped(), projections=PLAIN, example={"tokens": TOKENS})


def test_shared_modules():
    model = Plain()
    model.blocks[1].k = model.blocks[1].q  # a fused query and key, and a value of another layer
    model.blocks[1].v = model.blocks[0].v
    extractor = QKVExtractor(model, projections=PLAIN, example={"tokens": TOKENS})
    hidden = model.blocks[1].norm(model.blocks[0](model.embed(TOKENS)))
    assert_equal(extractor(tokens=TOKENS), QKV(*(getattr(model.blocks[1], p)(hidden) for p in "qkv")))
    loss_of(extractor(tokens=TOKENS)).backward()
    assert extractor.unused_parameters() == [n for n, p in model.named_parameters() if p.grad is None]

    one_path = QKVExtractor(model, projections=[PLAIN[0], PLAIN[0], PLAIN[2]], example={"tokens": TOKENS})
    assert_equal(one_path(tokens=TOKENS), extractor(tokens=TOKENS), 0)

    bert, batch = make("bert"), batch_of()
    bert.encoder.layer[2] = bert.encoder.layer[0]
    with torch.no_grad():
        assert_equal(QKVExtractor(bert, 3)(**batch), by_hand(bert, 3, batch))


# Errors


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_layer_that_does_not_exist_is_an_error_with_the_legal_ones(layer):
    with pytest.raises(ValueError, match=rf"layer={layer}: expected 1 to 3, or -3 to -1"):
        QKVExtractor(make("bert"), layer)


@pytest.mark.parametrize("layer", [1.0, True, "2", None])
def test_a_layer_must_be_an_integer(layer):
    with pytest.raises(TypeError, match="layer"):
        QKVExtractor(make("bert"), layer)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (LLAMA[:2], "query, key and value"),
        ("blocks", "has other stacks of layers"),
        ([name.replace(".{i}", ".0") for name in LLAMA], r"\{i\}"),
        ([LLAMA[0], LLAMA[1], "rotary_emb.{i}.v"], "one list of layers"),
        ([LLAMA[0]] * 3, "fused"),
        ([name.replace("_proj", "_lin") for name in LLAMA], "no module layers.2.self_attn.q_lin"),
        ([name.replace("layers", "blocks") for name in LLAMA], "no module blocks"),
        ([f"self_attn.{{i}}.{p}" for p in "qkv"], "no module self_attn"),
    ],
)
def test_wrong_names_are_errors(names, message):
    with pytest.raises(ValueError, match=message):
        QKVExtractor(make_rotary(), projections=names)


def test_other_wrong_arguments_are_errors():
    model, batch = make("bert"), batch_of()
    with pytest.raises(TypeError, match="model"):
        QKVExtractor("bert")
    with pytest.raises(ValueError, match="rotary"):
        QKVExtractor(model, rotary="behind")
    with pytest.raises(ValueError, match="does not use transformers' attention interface"):
        QKVExtractor(make("mpnet"), rotary="after")
    with pytest.raises(ValueError, match="no projections with usual names"):
        QKVExtractor(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="frozen"):
        QKVExtractor(model, 1, "yes")
    extractor = QKVExtractor(model)
    with pytest.raises(TypeError, match=r"extractor\(\*\*batch\)"):
        extractor(batch)
    with pytest.raises(TypeError, match="cu_seq_lens_q, max_length_q describe a flattened batch"):
        extractor(**batch, cu_seq_lens_q=torch.tensor([0, 3]), max_length_q=3)
    with pytest.raises(TypeError, match=r"unknown attention_masks; the model takes attention_mask"):
        extractor(input_ids=batch["input_ids"], attention_masks=batch["attention_mask"])
    with pytest.raises(TypeError, match="output_attentions"):
        extractor(**batch, output_attentions=True)
