"""RelationTerm: values, gradients, what the teacher runs, causal models, copies and misuse."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from minilm_kernels import MiniLMLoss, MiniLMv2Loss, QKVExtractor, integrations, record_qkv
from minilm_kernels.integrations import RelationTerm

from .test_qkv import batch_of, make, make_rotary

LOSS = MiniLMv2Loss(6)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def masked_lm(layers: int, hidden: int) -> nn.Module:
    return make("bert", layers, hidden, AutoModelForMaskedLM, **NO_DROPOUT)


def student_and_teacher() -> tuple[nn.Module, nn.Module]:
    return masked_lm(2, 24).train(), masked_lm(4, 48)


def decoders() -> tuple[nn.Module, nn.Module]:
    student = make_rotary("qwen3", 2, hidden_size=24, head_dim=6)
    return student.train(), make_rotary("qwen3", 3)


def ran(module: nn.Module) -> list:
    """A list that gets an entry each time the module runs."""
    found: list = []
    module.register_forward_hook(lambda *_: found.append(True))
    return found


def gradients(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


# Values


@pytest.mark.parametrize("teacher_layer", [3, -1])
def test_the_value_is_the_loss_of_the_extractors(teacher_layer):
    (student, teacher), batch = student_and_teacher(), batch_of()
    term = RelationTerm(student, teacher, LOSS, {teacher_layer: 2})
    extracted = QKVExtractor(teacher, teacher_layer, frozen=True)(**batch), QKVExtractor(student, 2)(**batch)
    term.clear()
    expected = LOSS(*extracted, batch["attention_mask"])
    for student_first in (False, True):
        if student_first:
            student(**batch)
        assert term.run_teacher(**batch) is None
        if not student_first:
            student(**batch)
        value = term.value(batch["attention_mask"])
        assert torch.equal(value, expected)
    torch.testing.assert_close(gradients(value, student), gradients(expected, student), rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_components_and_several_layers():
    (student, teacher), batch = student_and_teacher(), batch_of()
    mask = batch["attention_mask"]
    term = RelationTerm(student, teacher, LOSS.with_layers({4: 2, -3: 1}))
    with record_qkv(teacher, [4, 2]) as of_teacher, record_qkv(student, [2, 1]) as of_student:
        term.run_teacher(**batch)
        student(**batch)
        of_teacher, of_student = of_teacher.pop(), of_student.pop()
    components = term.components(mask)
    expected = {
        f"{name}/{relation}": value
        for name, t, s in ((4, 4, 2), (-3, 2, 1))
        for relation, value in LOSS.components(of_teacher[t], of_student[s], mask).items()
    }
    assert list(components) == ["4/qq", "4/kk", "4/vv", "-3/qq", "-3/kk", "-3/vv"]
    torch.testing.assert_close(components, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(term.total(components), sum(expected.values()))
    weighted = MiniLMv2Loss(6, layers={4: 2, -3: 1}, layer_weights={-3: 0.5}, relations={"qq": 2.0, "vv": 1.0})
    other = RelationTerm(student, teacher, weighted)
    other.run_teacher(**batch)
    student(**batch)
    found = expected["4/qq"] * 2 + expected["4/vv"] + expected["-3/qq"] + expected["-3/vv"] * 0.5
    torch.testing.assert_close(other.value(mask), found)
    same = RelationTerm(student, teacher, LOSS, {4: 2, -3: 1})
    same.run_teacher(**batch)
    student(**batch)
    torch.testing.assert_close(same.components(mask), expected, rtol=1e-6, atol=0)


def test_relations_before_and_after_the_rotation():
    (student, teacher), batch = decoders(), batch_of()
    mask = batch["attention_mask"]
    losses = {"before": LOSS, "after": MiniLMv2Loss(2, relations={"qq": 1.0})}
    term = RelationTerm(student, teacher, losses)
    term.run_teacher(**batch)
    student(**batch)
    components = term.components(mask)
    expected = {}
    for rotary, loss in losses.items():
        qkv = [QKVExtractor(model, rotary=rotary)(**batch) for model in (teacher, student)]
        found = loss.components(type(qkv[0])(*(x.detach() for x in qkv[0])), qkv[1], mask, causal=True)
        expected |= {f"{rotary}/{name}": value for name, value in found.items()}
    assert list(components) == ["before/qq", "before/kk", "before/vv", "after/qq"]
    torch.testing.assert_close(components, expected, rtol=0, atol=0)
    torch.testing.assert_close(term.total(components), sum(expected.values()))


def test_rows_of_completions():
    (student, teacher), batch = decoders(), batch_of()
    mask = batch["attention_mask"]
    completion = torch.zeros_like(mask)
    completion[:, 6:] = 1
    term = RelationTerm(student, teacher, MiniLMv2Loss(6, reduction="token"))
    term.run_teacher(**batch)
    student(**batch)
    value = term.value(mask, query_mask=completion)
    rows = MiniLMv2Loss(6, reduction="none")
    with record_qkv(teacher) as of_teacher, record_qkv(student) as of_student, torch.no_grad():
        teacher(**batch)
        student.eval()(**batch)
        each = rows(of_teacher.pop()[-1], of_student.pop()[-1], mask, causal=True).sum(1)
    counted = (mask * completion).bool()
    torch.testing.assert_close(value, each[counted].sum() / (6 * counted.sum()))


def test_one_value_for_each_column():
    (student, teacher), columns = student_and_teacher(), [batch_of(length=7), batch_of(length=9)]
    term, values = RelationTerm(student, teacher, LOSS), []
    for batch in columns:
        student(**batch)
        term.run_teacher(**batch)
        values.append(term.value(batch["attention_mask"]))
    sum(values).backward()
    assert values[0] != values[1]


def test_packed_models():
    """Models that run on packed tokens see (1, T); each sequence has its own positions here, so there is only one."""
    (student, teacher), ids = student_and_teacher(), torch.randint(5, 200, (1, 9))
    term = RelationTerm(student, teacher, LOSS)
    values = []
    for masks in ({}, {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32), "max_seqlen": 9}):
        term.run_teacher(input_ids=ids)
        student(input_ids=ids)
        values.append(term.value(**masks))
    torch.testing.assert_close(*values)


def test_num_items_combines_the_parts_of_a_batch():
    (student, teacher), batch = student_and_teacher(), batch_of(3)
    batch["attention_mask"][2] = 0
    for reduction in ("sequence", "token"):
        term = RelationTerm(student, teacher, MiniLMv2Loss(6, reduction=reduction))
        values, items = [], []
        for part in (slice(0, 3), slice(0, 1), slice(1, 3)):
            inputs = {name: x[part] for name, x in batch.items()}
            term.run_teacher(**inputs)
            student(**inputs)
            values.append(term.value(inputs["attention_mask"]))
            items.append(term.num_items(inputs["attention_mask"]))
        torch.testing.assert_close(values[0], (values[1] * items[1] + values[2] * items[2]) / items[0])
        term.remove()
    assert LOSS.num_items(torch.ones(2, 3), torch.tensor([[0, 0, 0], [0, 1, 0]])) == 1
    with pytest.raises(ValueError, match='reduction "sum" is not an average'):
        MiniLMv2Loss(6, reduction="sum").num_items(torch.ones(2, 3))


# The teacher


@pytest.mark.parametrize("rotary", ["before", "after"])
def test_the_teacher_ends_after_the_last_recorded_layer(rotary):
    (student, teacher), batch = student_and_teacher(), batch_of()
    layers = teacher.bert.encoder.layer
    second, third, head = ran(layers[1]), ran(layers[2].output), ran(teacher.cls)
    attention = ran(layers[2].attention.output)
    term = RelationTerm(student, teacher, LOSS, {3: 2, 1: 1}, rotary=rotary)
    term.run_teacher(**batch, labels=batch["input_ids"])
    student(**batch)
    expected = term.value(batch["attention_mask"])
    assert (len(second), len(third), len(head), len(attention)) == (1, 0, 0, 0)
    output = term.run_teacher(**batch, labels=batch["input_ids"], output=True, output_hidden_states=True)
    student(**batch)
    assert torch.equal(term.value(batch["attention_mask"]), expected)
    assert (len(second), len(third), len(head)) == (2, 1, 1)
    assert output.logits.shape == (3, 11, 200)
    assert len(output.hidden_states) == 5
    assert output.loss is None
    assert not output.logits.requires_grad


def test_a_trainer_runs_the_teacher_itself():
    (student, teacher), batch = student_and_teacher(), batch_of()
    term = RelationTerm(student, teacher, LOSS)
    term.run_teacher(**batch)
    student(**batch)
    expected = term.value(batch["attention_mask"])
    with torch.no_grad():
        teacher(**batch)
    student(**batch)
    assert torch.equal(term.value(batch["attention_mask"]), expected)


def test_a_compiled_teacher():
    torch._dynamo.reset()
    (student, teacher), batch = student_and_teacher(), batch_of()
    term = RelationTerm(student, torch.compile(teacher, backend="eager"), LOSS, {3: 2})
    student(**batch)
    term.run_teacher(**batch)
    found = term.value(batch["attention_mask"])
    plain = RelationTerm(student, teacher, LOSS, {3: 2})
    student(**batch)
    plain.run_teacher(**batch)
    torch.testing.assert_close(found, plain.value(batch["attention_mask"]))
    torch._dynamo.reset()


def test_the_teacher_gets_what_it_takes():
    teacher = make("distilbert", 2)  # has no token types
    student, batch = masked_lm(2, 24), batch_of()
    term = RelationTerm(student, teacher, LOSS)
    term.run_teacher(**batch, token_type_ids=torch.zeros_like(batch["input_ids"]), modality="text")
    with pytest.raises(TypeError, match="attention_masks"):
        term.run_teacher(input_ids=batch["input_ids"], attention_masks=batch["attention_mask"])


def test_a_teacher_of_another_dtype():
    (student, teacher), batch = student_and_teacher(), batch_of()
    term = RelationTerm(student, teacher.bfloat16(), LOSS)
    term.run_teacher(**batch)
    student(**batch)
    value = term.value(batch["attention_mask"])
    assert value.dtype == torch.float32
    value.backward()


def test_a_teacher_moves_from_the_cpu_to_its_inputs():
    """The meta device stands for an accelerator."""
    (student, teacher), batch = student_and_teacher(), batch_of()
    far = {name: x.to("meta") for name, x in batch.items()}
    term = RelationTerm(student, teacher, LOSS)
    assert term._teacher_batch(far)["input_ids"].device.type == "meta"
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}
    assert term._teacher_batch(batch)["input_ids"].device.type == "meta"  # it does not move back


def test_the_teacher_stays_in_evaluation_mode():
    (student, teacher), batch = student_and_teacher(), batch_of()
    teacher.train()
    term = RelationTerm(student, teacher, LOSS)
    assert not teacher.training
    assert student.training
    teacher.train()
    with pytest.raises(RuntimeError, match="teacher: it is in training mode"):
        term.run_teacher(**batch)


def test_generation_before_the_step():
    sizes = make_rotary("qwen3").config
    student, teacher = (AutoModelForCausalLM.from_config(sizes).eval() for _ in range(2))
    ids = torch.randint(5, 200, (2, 5))
    term = RelationTerm(student, teacher, LOSS)
    text = student.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    term.clear()
    term.run_teacher(input_ids=text)
    student(input_ids=text)
    assert torch.isfinite(term.value())


# Causal models


def of_type(model_type: str, **settings) -> nn.Module:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = AutoConfig.for_model(model_type, vocab_size=200, **(sizes | settings))
    return AutoModel.from_config(config)


@pytest.mark.parametrize(
    ("model_type", "settings", "causal"),
    [
        ("bert", {}, False),
        ("bert", {"is_decoder": True}, True),
        ("mpnet", {}, False),  # says nothing
        ("gpt2", {"n_embd": 24, "n_layer": 2, "n_head": 2}, True),
        ("modernbert", {"pad_token_id": 0, "global_attn_every_n_layers": 1}, False),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 12}, True),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 12, "is_causal": False}, False),
    ],
)
def test_causal_as_the_models_are(model_type, settings, causal):
    model, ids = of_type(model_type, **settings), torch.randint(5, 200, (2, 6))
    assert RelationTerm(model, copy.deepcopy(model), MiniLMv2Loss(2)).causal is causal
    with torch.no_grad():
        model.eval()
        same = torch.equal(model(ids)[0][:, 0], model(torch.cat([ids[:, :1], ids[:, 1:].flip(1)], 1))[0][:, 0])
    assert same is causal


def test_a_model_without_the_attribute_is_tried():
    student, teacher = make("mpnet", 2, 24).train(), make("mpnet", 2, 24)
    term = RelationTerm(student, teacher, LOSS)
    assert term.causal is False
    assert student.training
    ids = torch.randint(5, 200, (2, 6))
    term.run_teacher(input_ids=ids)
    student(input_ids=ids)
    term.value()
    names = [f"layers.{{i}}.{name}" for name in "qkv"]
    for causal in (True, False):
        own = Own(causal)
        pair = {"student_projections": names, "teacher_projections": names}
        assert RelationTerm(own, Own(causal), LOSS, **pair).causal is causal
    with pytest.raises(ValueError, match="causal: choose True or False, it is unknown for the student"):
        RelationTerm(Own(True, fails=True), Own(True), LOSS, **pair)


class Own(nn.Module):
    """A model that says nothing about its attention."""

    def __init__(self, causal: bool, fails: bool = False):
        super().__init__()
        self.causal, self.fails = causal, fails
        self.embedding, self.layers = nn.Embedding(200, 12), nn.ModuleList([nn.Module()])
        for name in "qkv":
            self.layers[0].add_module(name, nn.Linear(12, 12))

    def forward(self, input_ids):
        if self.fails:
            raise IndexError("no")
        x = self.embedding(input_ids)
        q, k, v = (self.layers[0].get_submodule(name)(x)[:, None] for name in "qkv")
        return (nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)[:, 0],)


def test_causal_values_with_left_padding():
    (student, teacher), batch = decoders(), batch_of()
    mask = batch["attention_mask"]
    term = RelationTerm(student, teacher, LOSS)
    extracted = [QKVExtractor(model, -1)(**batch) for model in (teacher.requires_grad_(False), student)]
    term.clear()
    for masks in ({}, {"causal": False}, {"prefix_lens": torch.tensor([3, 0, 5])}):
        term.run_teacher(**batch)
        student(**batch)
        assert torch.equal(term.value(mask, **masks), LOSS(*extracted, mask, **({"causal": True} | masks)))


def test_only_one_model_is_causal():
    encoder, decoder = make("bert", 2, 24), make_rotary("qwen3", 2)
    with pytest.raises(ValueError, match="causal: the teacher is causal and the student is not; choose True or False"):
        RelationTerm(encoder, decoder, LOSS)
    assert not any("forward" in vars(module) for model in (encoder, decoder) for module in model.modules())
    assert RelationTerm(encoder, decoder, LOSS, causal=True).causal is True


# Copies and state


class Holder(nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        self.student = student
        self.term = RelationTerm(student, teacher, LOSS)


def test_the_term_is_no_state_of_a_module():
    student, teacher = student_and_teacher()
    holder = Holder(student, teacher)
    assert set(holder.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    assert len(list(holder.parameters())) == len(list(student.parameters()))
    holder.train()
    assert not teacher.training


def step(term: RelationTerm, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    term.run_teacher(**batch)
    term.student(**batch)
    return term.value(batch["attention_mask"])


def test_copies():
    batch, (student, teacher) = batch_of(), student_and_teacher()
    holder = Holder(student, teacher)
    expected = step(holder.term, batch)
    twin = copy.deepcopy(holder)
    assert twin.term.student is twin.student
    assert twin.student is not student
    assert twin.term.teacher is teacher
    with torch.no_grad():
        twin.student.bert.encoder.layer[1].attention.self.query.weight.mul_(3)
    assert step(twin.term, batch) != expected
    holder.term.clear()  # the teacher is shared
    assert step(holder.term, batch) == expected


@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_pickles(dump):
    batch, file = batch_of(), io.BytesIO()
    holder = Holder(*student_and_teacher())
    expected = step(holder.term, batch)
    dump(holder, file)
    file.seek(0)
    twin = pickle.load(file) if dump is pickle.dump else torch.load(file, weights_only=False)
    assert twin.term.student is twin.student
    assert step(twin.term, batch) == expected


def test_removal():
    student, teacher = student_and_teacher()
    RelationTerm(student, teacher, LOSS).remove()
    assert not any("forward" in vars(module) for model in (student, teacher) for module in model.modules())


# Misuse


def test_each_model_runs_once_before_the_value():
    (student, teacher), batch = student_and_teacher(), batch_of()
    term, mask = RelationTerm(student, teacher, LOSS), batch["attention_mask"]
    student(**batch)
    with pytest.raises(RuntimeError, match=r"teacher: layer 4 did not run since the last pop"):
        term.value(mask)
    term.run_teacher(**batch)
    with pytest.raises(RuntimeError, match=r"student: layer 2 did not run"):
        term.value(mask)
    for twice in (student, term.run_teacher):
        term.run_teacher(**batch)
        student(**batch)
        twice(**batch)
        with pytest.raises(RuntimeError, match=r"(student|teacher): layer \d ran more than once"):
            term.value(mask)
        step(term, batch)  # nothing is left over
    with torch.no_grad():
        student(**batch)
    term.run_teacher(**batch)
    with pytest.raises(RuntimeError, match="student: layer 2 was recorded without gradient"):
        term.value(mask)


def test_the_same_tokens_for_both():
    student, teacher = student_and_teacher()
    term = RelationTerm(student, teacher, LOSS)
    term.run_teacher(**batch_of(length=9))
    student(**batch_of(length=11))
    with pytest.raises(ValueError, match=r"tokens of shape \(3, 9\) and \(3, 11\); expected the same tokens"):
        term.value()
    step(term, batch_of())


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"loss": nn.MSELoss()}, TypeError, "loss: expected MiniLMLoss or MiniLMv2Loss"),
        ({"loss": {}}, TypeError, "loss: expected"),
        ({"loss": {"before": LOSS, "behind": LOSS}}, ValueError, 'rotary=.behind.: expected "before" or "after"'),
        (
            {"loss": {"before": LOSS, "after": MiniLMLoss(2, reduction="sum")}},
            ValueError,
            "reduction, got sequence and s",
        ),
        ({"layers": {5: 1}}, ValueError, "layer=5: expected 1 to 4"),
        ({"layers": {4: 3}}, ValueError, "layer=3: expected 1 to 2"),
        (
            {"layers": {4: 1}, "loss": LOSS.with_layers({4: 2})},
            ValueError,
            r"layers: .* \{4: 2\}, or None, got \{4: 1\}",
        ),
        ({"layers": {}}, ValueError, "layers: expected a mapping"),
        ({"student": None}, TypeError, "model: expected"),
    ],
)
def test_wrong_arguments(arguments, exception, message):
    student, teacher = student_and_teacher()
    with pytest.raises(exception, match=message):
        RelationTerm(**({"student": student, "teacher": teacher, "loss": LOSS} | arguments))
    assert not any("forward" in vars(module) for model in (student, teacher) for module in model.modules())


# The package


def test_the_package_is_lazy():
    assert dir(integrations) == sorted(integrations.__all__)
    assert set(integrations._NAMES) == set(integrations.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = integrations.Trainer
    code = (
        "import sys, minilm_kernels.integrations as i; dir(i); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); "
        "i.RelationTerm; assert 'torch' in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=600)
