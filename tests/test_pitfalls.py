"""Pitfalls of public implementations. Each test passes for this package and fails for a wrong variant.

Pitfall 18, rotary and sliding-window models, is tested in tests/test_qkv.py.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoConfig, AutoModel, PreTrainedModel

from minilm_kernels import QKV, MiniLMLoss, MiniLMv2Loss, QKVExtractor, relation_kl
from minilm_kernels.presets import PRESETS

B, S, A, D_T, D_S = 3, 12, 4, 8, 6
LENGTHS = torch.tensor([12, 5, 8])
RIGHT = torch.arange(S) < LENGTHS[:, None]


def _inputs(spread: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (spread * torch.randn(B, S, A, width, generator=generator) for width in (D_T, D_S))


def _scores(x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    return torch.einsum("biad,bjad->baij", x, x) * (x.shape[-1] ** -0.5 if scale is None else scale)


def _naive(
    teacher, student, mask=RIGHT, *, fill=-torch.inf, keys=None, rows=None, kl=None, scale=None, probability=None
):
    """A dense loss with one replaceable part. The means are those of reduction "token"."""
    keys, rows = (mask if keys is None else keys), (mask if rows is None else rows)
    logs = [
        _scores(x, scale).masked_fill(~keys[:, None, None], fill).log_softmax(-1).masked_fill(~keys[:, None, None], 0.0)
        for x in (teacher, student)
    ]
    probabilities = [log.exp() * keys[:, None, None] for log in logs]
    if probability is not None:
        probabilities = [probability(p) for p in probabilities]
        logs = [p.log() for p in probabilities]
    if kl is None:
        per_row = (probabilities[0] * (logs[0] - logs[1])).nan_to_num(0.0).sum(-1)
    else:
        per_row = kl(*probabilities, *logs).sum(-1)
    return (per_row * rows[:, None]).sum() / (A * rows.sum())


def _ours(teacher, student, mask=RIGHT, **kwargs):
    return relation_kl(teacher, None, student, None, attention_mask=mask, reduction="token", **kwargs)


def _agree(value, expected, tolerance=1e-4) -> bool:
    return bool((value - expected).abs() <= tolerance * expected.abs())


def test_the_naive_loss_without_a_mistake_agrees():
    teacher, student = _inputs()
    assert _agree(_naive(teacher, student), _ours(teacher, student))


def _softmax_again(p):
    return p.masked_fill(p == 0, -torch.inf).softmax(-1)


def _reversed(p, q, log_p, log_q):
    return q * (log_q - log_p)


def test_masks_that_models_take_but_mean_something_else():
    """If every nonzero value counted as valid, additive masks would mask the wrong tokens, and segments would mix."""
    teacher, student = _inputs()
    additive = (1 - RIGHT.long()) * -10000
    assert not _agree(_naive(teacher, student, additive != 0), _naive(teacher, student), 0.01)
    segments = torch.where(torch.arange(S) < 4, 1, 2).expand(B, S)
    apart = [
        relation_kl(teacher[:, part], None, student[:, part], None, reduction="sum") for part in (slice(4), slice(4, S))
    ]
    assert not _agree(_naive(teacher, student, segments != 0), sum(apart) / (A * B * S), 0.01)
    for mask, name in (
        (additive, "additive"),
        (additive.float(), "additive"),
        (segments, "segment"),
        (segments.float(), "segment"),
    ):
        with pytest.raises(ValueError, match=f"attention_mask: .*{name}"):
            _ours(teacher, student, mask)


EVERYTHING = torch.ones(B, S, dtype=torch.bool)


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param({"kl": _reversed}, id="1 direction reversed"),
        pytest.param({"probability": _softmax_again}, id="2 softmax of probabilities"),
        pytest.param({"keys": EVERYTHING}, id="3 padded keys not masked"),
        pytest.param({"rows": EVERYTHING, "keys": EVERYTHING}, id="4 padded rows counted"),
        pytest.param({"scale": D_T**-0.5}, id="10 the teacher's width for both"),
        pytest.param({"scale": (A * D_T) ** -0.5}, id="10 the hidden size for the width"),
        pytest.param({"scale": 1.0}, id="10 no scale"),
    ],
)
def test_another_value(mistake):
    teacher, student = _inputs()
    expected = relation_kl(
        teacher.double(), None, student.double(), None, attention_mask=RIGHT, reduction="token", backend="reference"
    )
    assert _agree(_ours(teacher, student), expected)
    assert not _agree(_naive(teacher, student, **mistake), expected, 0.01)


@pytest.mark.parametrize("kind", ["left", "holes"])
def test_5_any_padding_side(kind):
    """The wrong variant trims each sequence to its number of valid tokens, which requires right padding."""
    teacher, student = _inputs()
    mask = RIGHT.flip(1) if kind == "left" else RIGHT[:, torch.randperm(S, generator=torch.Generator().manual_seed(1))]
    cut = torch.arange(S) < mask.sum(1, keepdim=True)
    expected = torch.stack(
        [relation_kl(teacher[b][m][None], None, student[b][m][None], None, reduction="sum") for b, m in enumerate(mask)]
    ).sum() / (A * mask.sum())
    assert _agree(_ours(teacher, student, mask), expected)
    assert not _agree(_ours(teacher, student, cut), expected, 0.01)


def test_6_no_dropout_on_relations():
    """Equal models in training mode have divergence 0, unless dropout is applied to the probabilities."""
    qkv = QKV(*(torch.randn(2, 16, 24) for _ in range(3)))
    for loss in (MiniLMv2Loss(4).train(), MiniLMLoss(4).train()):
        assert loss(qkv, qkv) < 1e-6
    teacher, _ = _inputs()
    dropped = _naive(teacher, teacher, probability=lambda p: torch.nn.functional.dropout(p + 1e-9, 0.1))
    assert not dropped < 1e-2


def test_7_the_gradient_lives_where_the_student_is_most_wrong():
    """If the student's probability of the teacher's key is e^-60, log(p + eps) has no gradient."""
    query, teacher_key = torch.ones(1, 1, 1, 1), torch.tensor([8.0, -8.0]).view(1, 2, 1, 1)
    student_key = torch.tensor([-30.0, 30.0]).view(1, 2, 1, 1)

    def gradient(loss) -> torch.Tensor:
        key = student_key.clone().requires_grad_()
        loss(key).backward()
        return key.grad.norm()

    def ours(key):
        pad = [x.expand(1, 2, 1, 1) for x in (query, query)]
        return relation_kl(pad[0], teacher_key, pad[1], key, reduction="none")[0, 0, 0]

    def with_log(log):
        p = teacher_key.flatten().softmax(-1)
        return lambda key: (p * (p.log() - log(key.flatten().softmax(-1)))).sum()

    assert gradient(ours) > 1
    torch.testing.assert_close(gradient(ours), gradient(with_log(lambda q: q.double().clamp(1e-300).log())))
    assert gradient(with_log(lambda q: (q + 1e-9).log())) < 1e-6
    assert gradient(with_log(lambda q: q.clamp(min=1e-9).log())) < 1e-6


@pytest.mark.parametrize("fill", [-torch.inf, -1e9])
def test_8_rows_without_keys_and_half_precision(fill):
    """Masks of −inf give NaN for a sequence without tokens, and −1e9 does not exist in float16."""
    teacher, student = _inputs()
    mask = RIGHT.clone()
    mask[1] = False
    student.requires_grad_()
    value = _ours(teacher, student, mask)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert not student.grad[1].any()
    if fill == -torch.inf:
        wrong = _scores(student.detach()).masked_fill(~mask[:, None, None], fill).softmax(-1)
        assert wrong.isnan().any()
    else:
        with pytest.raises(RuntimeError, match="overflow"):
            _scores(student.detach().half()).masked_fill(~mask[:, None, None], fill)
    half = _ours(teacher.half() * 30, student.detach().half() * 30, mask)  # scores beyond 65 504
    assert half.isfinite()
    assert not (_scores(teacher.half() * 60)).isfinite().all()


def test_9_bf16_scores_make_negative_divergences():
    x = torch.randn(1, 64, A, 8, dtype=torch.bfloat16)
    near = x + 0.004 * torch.randn_like(x)
    ours = relation_kl(x, None, near, None, reduction="none")
    exact = relation_kl(x.double(), None, near.double(), None, reduction="none", backend="reference")
    log_t, log_s = (_scores(y).log_softmax(-1) for y in (x, near))
    rounded = (log_t.exp() * (log_t - log_s)).sum(-1)
    assert ours.min() >= 0
    assert (ours - exact).norm() < 1e-2 * exact.norm()
    assert rounded.min() < 0


def test_11_heads_are_cut_within_a_token():
    """Splitting (B, A, S, d) again without transposing it back mixes tokens."""
    teacher, student = (torch.randn(B, A, S, d) for d in (D_T, D_S))
    right = [QKV(*[x.transpose(1, 2).reshape(B, S, -1)] * 3) for x in (teacher, student)]
    wrong = [QKV(*[x.reshape(B, S, -1)] * 3) for x in (teacher, student)]
    loss = MiniLMv2Loss(2)
    permutation = torch.randperm(S)  # the loss over all tokens does not depend on their order
    shuffled = [QKV(*[x[:, :, permutation].transpose(1, 2).reshape(B, S, -1)] * 3) for x in (teacher, student)]
    torch.testing.assert_close(loss(*shuffled), loss(*right))
    wrong_shuffled = [QKV(*[x[:, :, permutation].reshape(B, S, -1)] * 3) for x in (teacher, student)]
    assert not _agree(loss(*wrong_shuffled), loss(*wrong), 1e-3)


def _roberta() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A small RoBERTa and a batch of its tokenizer, which has no token_type_ids."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    model = AutoModel.from_config(AutoConfig.for_model("roberta", vocab_size=50, **sizes)).eval()
    ids = torch.randint(5, 50, (2, 7))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_12_layers_are_counted_from_one():
    """Layer 2 projects the output of layer 1; a layer counted from 0 would be one too late."""
    model, batch = _roberta()
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states  # the embeddings are the first entry
        attention = [layer.attention.self for layer in model.encoder.layer]
        value = QKVExtractor(model, 2)(**batch).value
    torch.testing.assert_close(value, attention[1].value(hidden[1]))
    assert (attention[2].value(hidden[2]) - value).abs().max() > 0.01


def test_13_token_types_are_not_required():
    model, batch = _roberta()

    def with_token_types(model, batch):
        return model(batch["input_ids"], token_type_ids=batch["token_type_ids"])

    assert QKVExtractor(model)(**batch).query.shape == (2, 7, 24)
    with pytest.raises(KeyError, match="token_type_ids"):
        with_token_types(model, batch)


def test_14_no_synchronisation():
    """Fake tensors have no values, so `.item()` is impossible; forward and backward of the loss work."""

    def per_sample(teacher, student, mask):
        lengths = [mask[b].sum().item() for b in range(mask.shape[0])]
        return sum(
            relation_kl(teacher[b : b + 1, :n], None, student[b : b + 1, :n], None) for b, n in enumerate(lengths)
        )

    with FakeTensorMode():
        teacher, student = torch.randn(B, S, A, D_T), torch.randn(B, S, A, D_S, requires_grad=True)
        mask = torch.ones(B, S, dtype=torch.bool)
        _ours(teacher, student, mask).backward()
        with pytest.raises(DataDependentOutputException):
            per_sample(teacher, student, mask)


def test_15_chunks_are_not_saved():
    """Autograd keeps every chunk of a loop over chunks of heads; this operator keeps only the gradient."""
    teacher, student = torch.randn(1, 256, A, D_T), torch.randn(1, 256, A, D_S, requires_grad=True)

    def chunked():
        return sum(_naive_chunk(teacher[:, :, a : a + 1], student[:, :, a : a + 1]) for a in range(A))

    def saved(loss) -> int:
        sizes = []

        def pack(x):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss().backward()
        return sum(sizes)

    quadratic = A * 256 * 256
    assert saved(lambda: relation_kl(teacher, None, student, None)) <= student.numel() + 16 < quadratic
    assert saved(chunked) >= quadratic


def _naive_chunk(teacher, student):
    log_t, log_s = (_scores(x).log_softmax(-1) for x in (teacher, student))
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean()


def test_16_the_loss_holds_no_teacher():
    """A module that registers the teacher adds it to checkpoints and to the buckets of DDP."""

    class Wrong(torch.nn.Module):
        def __init__(self, teacher):
            super().__init__()
            self.teacher = teacher

    assert Wrong(torch.nn.Linear(2, 2)).state_dict()
    for loss in (MiniLMLoss(4), MiniLMv2Loss(4)):
        loss(*(QKV(*(torch.randn(1, 4, 8) for _ in range(3))) for _ in range(2)))
        assert not loss.state_dict()
        assert not list(loss.parameters())
    with pytest.raises(ValueError, match="detach"):
        relation_kl(torch.randn(1, 4, 1, 8, requires_grad=True), None, torch.randn(1, 4, 1, 8), None)


def test_17_grouped_query_models():
    """Keys and values that are narrower than queries have fewer heads; nothing is broadcast by accident."""
    teacher = QKV(torch.randn(2, 6, 32), torch.randn(2, 6, 8), torch.randn(2, 6, 8))
    student = QKV(*(torch.randn(2, 6, 16) for _ in range(3)))
    components = MiniLMv2Loss(4).components(teacher, student)
    for name, index in (("qq", 0), ("kk", 1), ("vv", 2)):
        x, y = (side[index].unflatten(-1, (4, -1)) for side in (teacher, student))
        torch.testing.assert_close(components[name], relation_kl(x, None, y, None))
    with pytest.raises(ValueError, match=r"'qk' of teacher.key of width 8 .* needs attention_heads"):
        MiniLMv2Loss(4, relations={"qk": 1.0})(teacher, student)
    query, key, value = (x.unflatten(-1, (-1, 8)).expand(2, 6, 4, 8) for x in teacher)  # one key head for four queries
    q, k, v = (x.unflatten(-1, (4, -1)) for x in student)
    components = MiniLMLoss(4).components(teacher, student)
    torch.testing.assert_close(components["qk"], relation_kl(query, key, q, k))
    torch.testing.assert_close(components["vv"], relation_kl(value, None, v, None))


def test_19_no_preset_is_the_layer_dropped_model():
    """Every second layer of a 12-layer student is not the same as a distilled 6-layer student."""
    assert not any("nreimers" in name.lower() for name in PRESETS)
