"""Mutants of the operator in Python, and of the losses."""

from . import Mutant

_API = "minilm_kernels/relation/api.py"
_MASKS = "minilm_kernels/relation/masks.py"
_OPERATOR = "minilm_kernels/relation/ops.py"
_INPUTS = "minilm_kernels/relation/inputs.py"
_BLOCKED = "minilm_kernels/relation/backends/blocked.py"
_LOSSES = "minilm_kernels/losses.py"

_VALIDATION = "tests/relation/test_validation.py"
_CONTRACT = "tests/relation/test_contract.py"
_ON_TORCH = f"{_CONTRACT} -k 'torch-'"  # the contract on the backend `torch`

MUTANTS = [
    # Validation.
    Mutant(
        _API,
        "        if x.requires_grad:\n",
        "        if x.requires_grad and x.is_leaf:\n",
        _VALIDATION,
        "a teacher that runs without no_grad() raises no error, and its graph takes memory for nothing",
    ),
    Mutant(
        _API,
        "if x.shape[:-2] != first.shape[:-2]:",
        "if x.shape[0] != first.shape[0]:",
        _VALIDATION,
        "tensors of other lengths reach the kernels",
    ),
    Mutant(
        _API,
        "if x.shape[-2] == 0 or x.shape[-1] == 0:",
        "if x.shape[-2] == 0:",
        _VALIDATION,
        "a width of 0 reaches the kernels",
    ),
    Mutant(
        _API,
        "if not math.isfinite(scale):",
        "if math.isinf(scale):",
        _VALIDATION,
        "a scale of NaN gives a loss of NaN and no message",
    ),
    # Rows that count and keys with fewer heads.
    Mutant(
        _MASKS,
        "return self.valid if self.query_mask is None else self.valid & (self.query_mask != 0)",
        "return self.valid if self.query_mask is None else self.query_mask != 0",
        _CONTRACT,
        "padding counts if the query mask is nonzero there",
    ),
    Mutant(
        _BLOCKED,
        "    if query != key and group.counted_rows is not None:",
        "    if query != key and group.counted_rows is None:",
        _ON_TORCH,
        "a NaN in a query that does not count reaches the gradients of the keys",
    ),
    Mutant(
        _BLOCKED,
        "return heads.expand(-1, -1, repeats, -1, -1).flatten(0, 2).contiguous()",
        "return heads.transpose(1, 2).expand(-1, repeats, -1, -1, -1).flatten(0, 2).contiguous()",
        _ON_TORCH,
        "query head a reads key head a % A_k",
    ),
    Mutant(
        _API,
        "if role in keys and heads % own:",
        "if role in keys and own > heads:",
        _VALIDATION,
        "key heads that do not divide the query heads reach the kernels",
    ),
    # Masks.
    Mutant(
        _MASKS,
        "return self.attention_mask != 0",
        "return self.attention_mask > 0",
        _CONTRACT,
        "an integer mask with −1 counts valid tokens as padding",
    ),
    Mutant(
        _MASKS,
        "nonempty = (counts > 0).sum().clamp(min=1)",
        "nonempty = (counts >= 0).sum().clamp(min=1)",
        "tests/relation/test_masks.py",
        "the mean includes sequences without tokens: the loss is too small",
    ),
    Mutant(
        _MASKS,
        "if bounds[0] != 0 or bounds[-1] != total",
        "if bounds[-1] != total",
        _VALIDATION,
        "if cu_seqlens does not begin at 0, tokens are silently left out",
    ),
    Mutant(
        _MASKS,
        "if self.max_seqlen is not None and max(lengths, default=0) > self.max_seqlen:",
        "if self.max_seqlen is not None and max(lengths, default=0) > 2 * self.max_seqlen:",
        _VALIDATION,
        "a max_seqlen that is too small reaches the kernels that size their tiles by it",
    ),
    Mutant(
        _MASKS,
        "allowed = position[:, None, :] <= position[:, :, None]",
        "allowed = position[:, None, :] < position[:, :, None]",
        f"{_CONTRACT} -k masks_and_reductions",
        "in the reference, a causal row does not see its own position: all backends are compared with wrong values",
    ),
    Mutant(
        _MASKS,
        "return positions, starts, (self.valid & in_prefix).sum(-1)",
        "return positions, starts, in_prefix.sum(-1)",
        f"{_CONTRACT} -k masks_and_reductions",
        "the length of a prefix includes padding: with left padding, rows see too many keys",
    ),
    Mutant(
        _MASKS,
        "self.prefix_lens.long().clamp(min=0).minimum(lengths)",
        "self.prefix_lens.long().minimum(lengths)",
        f"{_CONTRACT} {_VALIDATION}",
        "a negative prefix of a packed sequence",
        harmless="every backend compares positions with it, or takes the maximum with 0 itself",
    ),
    # The operators and autograd.
    Mutant(
        _OPERATOR,
        "part.detach() if skips else part * factors[r] for",
        "part.detach() for",
        "tests/relation/test_ops.py",
        "a weighted relation has the gradient of weight 1",
    ),
    Mutant(
        _OPERATOR,
        "grads[m] = part if so_far is None else so_far + part",
        "grads[m] = part",
        "tests/relation/test_ops.py -k upstream",
        "a tensor of several relations gets the gradient of the last one only",
    ),
    Mutant(
        _OPERATOR,
        "all(factor.item() == 1.0 for factor in factors)",
        "any(factor.item() == 1.0 for factor in factors)",
        "tests/relation/test_ops.py",
        "if one of several weights is 1, all weights are ignored",
    ),
    Mutant(
        _OPERATOR,
        "return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()",
        "return nullcontext()",
        "tests/relation/test_ops.py -k autocast",
        "scores in bfloat16 under autocast",
    ),
    Mutant(
        _OPERATOR,
        "any(g is not None for g in second_derivatives):",
        "not second_derivatives:",
        "tests/relation/test_ops.py",
        "a second derivative is 0 instead of an error",
    ),
    Mutant(
        _BLOCKED,
        "threads <= limit:",
        "threads <= 2**20:",
        "tests/relation/backends/test_blocked.py",
        "the bits of backend `torch` depend on the number of threads",
    ),
    Mutant(
        _INPUTS,
        "scale_s = width_s**-0.5 if",
        "scale_s = width_t**-0.5 if",
        "tests/test_losses.py",
        "the student's scores are divided by the teacher's width",
    ),
    Mutant(
        _INPUTS,
        "return torch.float64 if any(x.dtype == torch.float64 for x in (*teacher, *student))",
        "return torch.float64 if any(x.dtype == torch.float64 for x in student)",
        "tests/relation/test_ops.py -k float64",
        "a float64 teacher is rounded to float32",
    ),
    # Backend `torch`.
    Mutant(
        _BLOCKED,
        "return min(self.length, max(rows_end, self.longest_prefix))",
        "return min(self.length, max(rows_end, min(self.longest_prefix, 128)))",
        f"{_CONTRACT}",
        "prefixes of more than 128 tokens are cut",
    ),
    Mutant(
        _BLOCKED,
        "grads[-1][i, keys] += torch.bmm(excess.mT, q_s[i, rows] * weights)",
        "grads[-1][i, keys] += torch.bmm(excess.mT, q_s[i, rows] * weights.clamp(min=0))",
        _CONTRACT,
        'with reduction="none" a negative upstream gradient is lost for the keys',
    ),
    Mutant(
        _BLOCKED,
        "group.scatter(sum(others, one) * scale_s, buffer)",
        "group.scatter(sum(others, one) * scale_t, buffer)",
        _ON_TORCH,
        "gradients of a student narrower than the teacher are too small",
    ),
    Mutant(
        _BLOCKED,
        "return rows.masked_fill(~(counted if rows.dim() == 2 else counted[..., None]), 0.0)",
        "return rows",
        _ON_TORCH,
        "padding of a group of sequences counts in the loss",
    ),
    Mutant(
        _BLOCKED,
        "masked = masked & (key >= self.prefix[:, None])[:, None]",
        "masked = masked & (key > self.prefix[:, None])[:, None]",
        _ON_TORCH,
        "all rows see the first key after the prefix",
    ),
    Mutant(
        _BLOCKED,
        "torch.where(delta.abs() < 0.25, small, excess - p * delta)",
        "torch.where(delta.abs() < 0.25, excess - p * delta, small)",
        "tests/relation/test_contract.py -k 'near and torch-'",
        "if a student is close to its teacher, the KL of a single row is lost in rounding",
    ),
    Mutant(
        _BLOCKED,
        "torch.where(delta.abs() < 0.25,",
        "torch.where(delta.abs() < 2.5,",
        _ON_TORCH,
        "the threshold between two forms of the same number changes",
        harmless="expm1 is accurate for all values here, so both forms agree",
    ),
    Mutant(
        _BLOCKED,
        "if 2 * lengths[n] > longest]",
        "if 4 * lengths[n] > longest]",
        _ON_TORCH,
        "sequences of very different lengths share a block",
        harmless="only the amount of padding changes",
    ),
    # Losses.
    Mutant(
        _INPUTS,
        "first, *others = (weight * value for",
        "first, *others = (value for",
        "tests/test_losses.py",
        "the weights of relations are ignored",
    ),
    Mutant(
        _LOSSES,
        '{"qk": 1.0, "vv": 1.0}',
        '{"qq": 1.0, "vv": 1.0}',
        "tests/test_losses.py",
        "MiniLMLoss compares another relation than the paper",
    ),
    Mutant(
        _LOSSES,
        "call.pairs.append((names[0], names[1]))",
        "call.pairs.append((names[1], names[0]))",
        "tests/test_losses.py",
        "the rows and the keys of a relation are exchanged",
    ),
    Mutant(
        _LOSSES,
        "            weights=weights,\n            reduction=self.reduction,\n",
        "            weights=weights,\n",
        "tests/test_losses.py",
        "every loss uses the reduction 'sequence'",
    ),
    Mutant(
        _LOSSES,
        "return 1 / self.temperature if self.normalize",
        "return 1 / self.temperature / math.sqrt(heads.shape[-1]) if self.normalize",
        "tests/test_losses.py -k 'cosines or bitdistill'",
        "cosines are divided by the square root of the width, too",
    ),
    Mutant(
        _LOSSES,
        "            heads = heads.masked_fill((attention_mask == 0)[..., None, None], 0.0)\n",
        "            pass\n",
        "tests/test_losses.py -k padding",
        "NaN in padding makes the gradient of cosines NaN",
    ),
    Mutant(
        _LOSSES,
        ".repeat_interleave(self.repeats, dim=-2)",
        ".repeat_interleave(self.repeats, dim=-2).roll(1, -2)",
        "tests/test_losses.py -k grouped",
        "query heads meet the key heads of their neighbours",
    ),
    Mutant(
        _LOSSES,
        "values = values * (self.num_heads // heads)",
        "values = values * 1",
        "tests/test_losses.py -k grouped",
        "a sum over value heads counts each of them once",
    ),
    Mutant(
        _LOSSES,
        'layers = {f"{layer}/": weight for layer, weight in self.layer_weights.items()} or',
        'layers = {f"{layer}/": 1.0 for layer, weight in self.layer_weights.items()} or',
        "tests/test_losses.py -k layers",
        "the weights of layers are ignored",
    ),
]
