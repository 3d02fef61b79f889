"""Backend `torch`: blocked pure PyTorch on any device and dtype, with O(B·A·S) extra memory.

Every mask is first converted to one form (`Mask.unpad`): the valid tokens of each sequence are gathered side by side.
The padding of the inputs is then never computed, and causal and prefix bounds count gathered tokens. A block holds the
scores of its rows with all keys that they see, so that one pass over the scores with two softmaxes yields the loss and
the gradient. The derivation is in docs/mathematics.md.

On a CPU the results have the same bits for any number of threads. The blocks do not depend on that number, every thread
of a batched matrix product computes whole matrices (`_limit_threads`), and long sums are always split in the same way
(`_deterministic_sum`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from minilm_kernels._choices import Reduction
from minilm_kernels.relation.inputs import RelationInputs, grad_buffers

# Number of scores in one block. On a CPU the buffers should stay in the cache, and every operation should be large
# enough to be worth starting threads for. Medians in ns per pair for 2**17, 2**18, ..., 2**21 scores: 7.0, 5.7, 5.4,
# 5.8, 6.9 (A = 48, S = 512, widths (16, 8), two cores). The number for accelerators is an estimate.
_BLOCK_SCORES_CPU = 2**19
_BLOCK_SCORES_ACCELERATOR = 2**23
_BLOCK_ROWS = 128
_MIN_ROWS = 64  # matrix products of fewer rows are slower
_MIN_MATRICES = 4  # matrices per batched product, if there are that many; at most as many threads share them
_SUM_CHUNK = 2**14  # PyTorch sums at most this many elements on one thread


def unavailable_reason() -> str | None:
    return None


def unsupported_reasons(inputs: RelationInputs) -> list[str]:
    return []


def forward_reduced(inputs: RelationInputs, reduction: Reduction, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    weights = inputs.mask.sequence_weights(reduction, inputs.heads, inputs.dtype)
    values = torch.zeros(len(inputs.relations), dtype=inputs.dtype, device=inputs.mask.device)
    grads = _zero_gradients(inputs) if gradient else [[]] * len(inputs.relations)
    for group in _groups(inputs):
        row_weights = weights[group.sequences].repeat_interleave(inputs.heads)[:, None].expand(-1, group.length)
        row_weights = group.zero_uncounted(row_weights)
        for r in range(len(inputs.relations)):
            kl = _relation_kl(inputs, group, r, row_weights, grads[r], exact=not gradient)
            values[r] += _deterministic_sum(kl * row_weights)
    return inputs.total(values.clamp_(min=0.0)), [buffer for buffers in grads for buffer in buffers]


def forward_none(inputs: RelationInputs) -> Tensor:
    shape = (len(inputs.relations), *inputs.mask.token_shape, inputs.heads)
    out = torch.zeros(shape, dtype=inputs.dtype, device=inputs.mask.device)
    for group in _groups(inputs):
        for r in range(len(inputs.relations)):
            kl = group.zero_uncounted(_relation_kl(inputs, group, r, None, [], exact=True))
            group.scatter(kl.clamp_(min=0.0)[..., None], out[r, ..., None])
    return out.transpose(-1, -2).contiguous()


def backward_none(inputs: RelationInputs, row_grads: Tensor) -> list[Tensor]:
    grads = _zero_gradients(inputs)
    for group in _groups(inputs):
        for r in range(len(inputs.relations)):
            row_weights = group.gather(row_grads[r].transpose(-1, -2)[..., None], inputs.dtype)[..., 0]
            _relation_kl(inputs, group, r, group.zero_uncounted(row_weights), grads[r], exact=False)
    return [buffer for buffers in grads for buffer in buffers]


def _zero_gradients(inputs: RelationInputs) -> list[list[Tensor]]:
    """Returns the gradient buffers of each relation, filled with 0."""
    grads: list[list[Tensor]] = [[] for _ in inputs.relations]
    for r, m in grad_buffers(inputs.relations):
        grads[r].append(torch.zeros_like(inputs.student[m], dtype=inputs.dtype, memory_format=torch.contiguous_format))
    return grads


@dataclass(frozen=True)
class _Group:
    """n sequences of similar length, gathered to (n·A, L, D). L is the largest length; shorter ones are padded."""

    sequences: Tensor  # (n,) int64
    index: tuple[Tensor, ...]  # indexes a tensor of `token_shape` to (n, L) tokens; padding repeats the last token
    length: int
    valid: Tensor | None  # (n, L) bool; None without padding
    counted: Tensor | None  # (n, L) bool, rows that count; None if all do
    counted_rows: list[bool] | None  # (L,), whether a row counts in any sequence; None without query mask
    causal: bool
    prefix: Tensor | None  # (n,) int64, lengths in gathered tokens
    longest_prefix: int

    def gather(self, x: Tensor, dtype: torch.dtype, repeats: int = 1) -> Tensor:
        """Gathers (B, S, A, D) or (T, A, D) to (n·A·repeats, L, D)."""
        heads = x[self.index].transpose(1, 2).to(dtype)[:, :, None]
        return heads.expand(-1, -1, repeats, -1, -1).flatten(0, 2).contiguous()

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Writes (n·A, L, D) to the valid tokens of `out`, (B, S, A, D) or (T, A, D)."""
        values = values.unflatten(0, (len(self.sequences), -1)).transpose(1, 2)  # (n, L, A, D)
        if self.valid is None:
            out[self.index] = values
        else:
            out[tuple(part.expand(self.valid.shape)[self.valid] for part in self.index)] = values[self.valid]

    def zero_uncounted(self, rows: Tensor) -> Tensor:
        """Returns (n·A, L) or (n·A, L, D) with 0 on padding and on rows that do not count."""
        if self.counted is None:
            return rows
        counted = self.counted.repeat_interleave(rows.shape[0] // self.counted.shape[0], 0)
        return rows.masked_fill(~(counted if rows.dim() == 2 else counted[..., None]), 0.0)

    def num_keys(self, rows_end: int) -> int:
        """Returns how many keys the rows before `rows_end` can see."""
        if self.causal:
            return min(self.length, max(rows_end, self.longest_prefix))
        return self.length

    def masked_keys(self, rows: slice, matrices: slice, heads: int) -> Tensor | None:
        """Returns which keys the rows do not see: bool of (matrices or 1, rows, keys), or None if they see all keys."""
        key = torch.arange(self.num_keys(rows.stop), device=self.sequences.device)
        masked = None
        if self.causal:
            masked = (key > torch.arange(rows.start, rows.stop, device=key.device)[:, None])[None]
            if self.prefix is not None:
                masked = masked & (key >= self.prefix[:, None])[:, None]
        if self.valid is not None:
            padding = ~self.valid[:, None, : len(key)]
            masked = padding if masked is None else masked | padding
        if masked is None or masked.shape[0] == 1:
            return masked
        return masked[torch.arange(matrices.start, matrices.stop, device=key.device) // heads]


def _groups(inputs: RelationInputs) -> Iterator[_Group]:
    """Yields groups of sequences, longest first. Short sequences share a group as long as they fit into one block."""
    mask = inputs.mask
    tokens, starts, prefixes = mask.unpad()
    if mask.attention_mask is None and not mask.packed:  # the bounds are known without waiting for an accelerator
        bounds = [n * mask.token_shape[1] for n in range(mask.num_sequences + 1)]
    else:
        mask.check_bounds()  # the next line waits for the device in any case
        bounds = starts.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    row_counts = lengths if mask.query_mask is None else mask.row_counts.tolist()

    budget = _block_scores(mask.device)
    order = sorted((n for n in range(mask.num_sequences) if row_counts[n]), key=lambda n: -lengths[n])
    while order:
        longest = lengths[order[0]]
        fit = max(1, budget // (inputs.heads * longest * longest))
        members = [n for n in order[:fit] if 2 * lengths[n] > longest]
        order = order[len(members) :]

        def index(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=mask.device)

        sequences, ends = index(members), index([lengths[n] for n in members])[:, None]
        offsets = torch.arange(longest, device=mask.device)
        position = tokens[index([bounds[n] for n in members])[:, None] + offsets.minimum(ends - 1)]
        prefix = None if prefixes is None else prefixes[sequences]
        token = (position,) if mask.packed else (sequences[:, None], position)
        valid = counted = None if lengths[members[-1]] == longest else offsets < ends
        counted_rows = None
        if mask.query_mask is not None:
            counted = mask.counted[token] & (offsets < ends)
            counted_rows = counted.any(0).tolist()
        yield _Group(
            sequences=sequences,
            index=token,
            length=longest,
            valid=valid,
            counted=counted,
            counted_rows=counted_rows,
            causal=not mask.bidirectional,
            prefix=prefix,
            longest_prefix=0 if prefix is None else int(prefix.max()),
        )


def _block_scores(device: torch.device) -> int:
    return _BLOCK_SCORES_CPU if device.type == "cpu" else _BLOCK_SCORES_ACCELERATOR


def _relation_kl(
    inputs: RelationInputs, group: _Group, r: int, row_weights: Tensor | None, buffers: list[Tensor], exact: bool
) -> Tensor:
    """Returns the KL of a group's rows in relation r, (n·A, L); writes the gradient of their weighted sum to `buffers`.

    A KL near 0 may round to a negative number. The sum of many rows is clamped to 0, and not each row, because the
    positive errors alone would be a bias.

    `buffers` holds the gradient buffer of a self relation, or those of query and key of a cross relation. It is empty
    if no gradient is needed.
    """
    query, key = relation = inputs.relations[r]
    scale_t, scale_s = inputs.scales(relation)
    models, groups = (inputs.teacher, inputs.student), inputs.key_groups(relation)
    k_t, k_s = (group.gather(model[key], inputs.dtype, size) for model, size in zip(models, groups, strict=True))
    q_t, q_s = (k_t, k_s) if query == key else (group.gather(model[query], inputs.dtype) for model in models)
    if query != key and group.counted_rows is not None:  # the queries of other rows may be NaN
        q_t, q_s = group.zero_uncounted(q_t), group.zero_uncounted(q_s)
    q_t = q_t * scale_t
    matrices, length = q_s.shape[:2]
    kl = q_s.new_zeros(matrices, length)
    grads = [torch.zeros_like(q_s) for _ in buffers]

    scores = _block_scores(q_s.device)
    block_rows = min(length, _BLOCK_ROWS, max(_MIN_ROWS, scores // (2 * _MIN_MATRICES * length)))
    block_matrices = max(_MIN_MATRICES, scores // (block_rows * length))
    blocks = min(-(-matrices // block_matrices), max(1, matrices // _MIN_MATRICES))
    with _limit_threads(matrices // blocks, q_s.device):
        for block in range(blocks):
            i = slice(matrices * block // blocks, matrices * (block + 1) // blocks)
            for start in range(0, length, block_rows):
                rows = slice(start, min(start + block_rows, length))
                if group.counted_rows is not None and not any(group.counted_rows[rows]):
                    continue
                keys = slice(group.num_keys(rows.stop))
                scores_t = torch.bmm(q_t[i, rows], k_t[i, keys].mT)
                scores_s = torch.bmm(q_s[i, rows] * scale_s, k_s[i, keys].mT)
                kl[i, rows], excess = _block_kl(scores_t, scores_s, group.masked_keys(rows, i, inputs.heads), exact)
                if row_weights is not None and grads:
                    weights = row_weights[i, rows, None]
                    grads[0][i, rows] += torch.bmm(excess, k_s[i, keys]) * weights
                    grads[-1][i, keys] += torch.bmm(excess.mT, q_s[i, rows] * weights)
    for buffer, grad in zip(buffers, grads, strict=True):
        one, *others = grad.unflatten(0, (-1, inputs.heads // buffer.shape[-2])).unbind(1)
        group.scatter(sum(others, one) * scale_s, buffer)
    return kl


@contextmanager
def _limit_threads(limit: int, device: torch.device) -> Iterator[None]:
    """Runs the block with at most `limit` threads on the CPU.

    If a batched product has at least as many matrices as threads, every thread computes whole matrices. If it has
    fewer, PyTorch splits matrices, and the bits of the result depend on the number of threads.

    Python threads that first use PyTorch meanwhile also compute on `limit` threads, from then on. A product per matrix
    would not avoid this: PyTorch splits single matrices among its threads, too.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads <= limit:
        yield
        return
    torch.set_num_threads(limit)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _deterministic_sum(x: Tensor) -> Tensor:
    """Returns the sum of x in an order that does not depend on the number of threads."""
    x = x.flatten()
    while x.numel() > _SUM_CHUNK:
        x = torch.nn.functional.pad(x, (0, -x.numel() % _SUM_CHUNK))
        x = x.unflatten(0, (-1, _SUM_CHUNK)).sum(-1)
    return x.sum()


def _block_kl(scores_t: Tensor, scores_s: Tensor, masked: Tensor | None, exact: bool) -> tuple[Tensor, Tensor]:
    """Returns the rows' KL, (…, rows), and q − p, its derivative by the student's scores. Overwrites the scores.

    With δ = log q − log p, a row's KL is Σ p·(e^δ − 1 − δ) = Σ (q − p) − Σ p·δ. In both sums, errors of the two
    log-sum-exps cancel to first order. The right-hand side also has the rounding error of q − p, which matters only for
    single rows of small KL. `exact` avoids this error: where |δ| < 1/4, it uses the left-hand side.
    """
    if masked is not None:
        scores_t.masked_fill_(masked, -torch.inf)
        scores_s.masked_fill_(masked, -torch.inf)
    log_p, log_q = scores_t.log_softmax(-1), scores_s.log_softmax(-1)
    delta = torch.sub(log_q, log_p, out=scores_s)
    if masked is not None:
        delta.masked_fill_(masked, 0.0)
    p = log_p.exp_()
    excess = log_q.exp_().sub_(p)
    if exact:
        small = p * (delta.expm1() - delta)
        kl = torch.where(delta.abs() < 0.25, small, excess - p * delta).sum(-1)
    else:
        kl = excess.sum(-1) - p.mul_(delta).sum(-1)
    return kl, excess
