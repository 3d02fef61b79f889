"""prefix_mask: models that get it compute UniLM's sequence-to-sequence attention, as relation_kl does."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModel

from minilm_kernels import MiniLMLoss, MiniLMv2Loss, prefix_mask, record_qkv
from minilm_kernels.integrations import RelationTerm

from .test_qkv import batch_of, make

PREFIXES = torch.tensor([3, 0, 7])


def visible_keys(mask: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
    seen = torch.zeros(*mask.shape, mask.shape[1], dtype=torch.bool)
    for b, prefix in enumerate(prefixes.tolist()):
        for i in range(mask.shape[1]):
            for j in range(mask.shape[1]):
                seen[b, i, j] = bool(mask[b, i]) and bool(mask[b, j]) and (j <= i or j < prefix)
    return seen


def of_attention(implementation: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    config = make("bert", 2, 48).config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation=implementation, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_bert_attends_as_the_mask_says(implementation, dtype):
    model, batch = of_attention(implementation, dtype), batch_of()
    mask = batch["attention_mask"]
    with record_qkv(model, [1, 2]) as recorder, torch.no_grad():
        model(batch["input_ids"], attention_mask=prefix_mask(mask, PREFIXES, dtype))
        found = recorder.pop()
        hidden = model.embeddings(batch["input_ids"])
        heads = [x.unflatten(-1, (12, -1)).transpose(1, 2).double() for x in found[1]]
        scores = heads[0] @ heads[1].mT / math.sqrt(4)
        seen = visible_keys(mask, PREFIXES)[:, None]
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        context = (weights.nan_to_num() @ heads[2]).transpose(1, 2).flatten(2).to(dtype)
        layer = model.encoder.layer[0]
        attended = layer.attention.output(context, hidden)
        after = layer.output(layer.intermediate(attended), attended)
        expected = [projection(after) for projection in model.encoder.layer[1].attention.self.children()][:3]
    rows = mask.bool()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for x, y in zip(found[2], expected, strict=True):
        torch.testing.assert_close(x[rows], y[rows], rtol=0, atol=tolerance)
    assert all(torch.isfinite(x).all() for x in found[2])


def test_the_loss_sees_what_the_models_saw():
    """The attention relation of the loss is the attention distribution of the model, whose mask is another one."""
    models, batch = [of_attention("eager").eval() for _ in range(2)], batch_of()
    with torch.no_grad():
        for parameter in models[0].encoder.layer[1].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mask, logs = batch["attention_mask"], []
    inputs = {"input_ids": batch["input_ids"], "attention_mask": prefix_mask(mask, PREFIXES)}
    term = RelationTerm(*models, MiniLMLoss(12))
    term.run_teacher(**inputs)
    models[0](**inputs)
    value = term.components(mask, prefix_lens=PREFIXES)["qk"]
    for model in models:
        attentions = model(**inputs, output_attentions=True).attentions[-1].double()
        logs.append(attentions.clamp(min=1e-30).log())
    kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean(1)  # (B, S)
    expected = torch.stack([kl[b][mask[b].bool()].mean() for b in range(3)]).mean()
    assert expected > 1e-3
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-7)
    without = MiniLMv2Loss(4)
    term = RelationTerm(*models, without)
    values = []
    for prefixes in (PREFIXES, None):
        term.run_teacher(**inputs)
        models[0](**inputs)
        values.append(term.value(mask, prefix_lens=prefixes))
    assert values[0] != values[1]


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
FAMILIES = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "electra": {},
    "distilbert": {},
    "albert": {},
    "modernbert": {"pad_token_id": 0, "global_attn_every_n_layers": 1},
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 2},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 12},
    "llama": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """A change of a token changes the rows that see it, and no other row."""
    model = AutoModel.from_config(AutoConfig.for_model(family, vocab_size=200, **(SIZES | FAMILIES[family]))).eval()
    ids, mask = torch.randint(5, 200, (3, 7)), torch.ones(3, 7)
    prefixes = torch.tensor([4, 0, 2])
    seen = visible_keys(mask, prefixes)
    with torch.no_grad():
        first = model(ids, attention_mask=prefix_mask(mask, prefixes))[0]
        for j in range(7):
            changed = ids.clone()
            changed[:, j] = 3 + ids[:, j] % 2
            difference = (model(changed, attention_mask=prefix_mask(mask, prefixes))[0] - first).abs().amax(-1)
            reached = seen[:, :, j] | (seen[:, :, j].float()[:, None] @ seen.float().mT).squeeze(1).bool()  # 2 layers
            assert torch.equal(difference > 1e-6, reached), (j, difference, reached)


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        (
            (torch.ones(2, 3, 3), torch.zeros(2, dtype=torch.long)),
            ValueError,
            r"attention_mask: expected shape \(B, S\)",
        ),
        ((torch.ones(2, 3), torch.zeros(3, dtype=torch.long)), ValueError, "prefix_lens: expected one integer per seq"),
        ((torch.ones(2, 3), torch.zeros(2)), TypeError, "prefix_lens"),
        ((torch.ones(2, 3), None), TypeError, "prefix_lens: expected a tensor"),
        ((torch.ones(2, 3) * -10000, torch.zeros(2, dtype=torch.long)), ValueError, "attention_mask: .*additive mask"),
        ((torch.ones(2, 3), torch.zeros(2, dtype=torch.long), torch.bool), TypeError, "dtype: expected a floating"),
    ],
)
def test_wrong_arguments(arguments, exception, message):
    with pytest.raises(exception, match=message):
        prefix_mask(*arguments)
