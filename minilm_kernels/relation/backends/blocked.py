"""Backend `torch`: blocked pure PyTorch on any device and dtype, with O(B·A·S) extra memory.

Every mask becomes one form first: the real tokens of each sequence, gathered side by side (hidden keys are then not
there at all), with a causal or prefix bound that counts gathered tokens. Rows are worked through in blocks that hold
all their keys, so a block has its softmax at once: both phases of the computation, loss and gradient, fall into one
visit with two softmaxes a pair, and no score is computed twice. See docs/mathematics.md.

Results on a CPU are the same bits for any number of threads: the blocks do not depend on it, every matrix product
leaves whole matrices to a thread (`_threads`), and large sums are cut alike (`_total`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from minilm_kernels.relation.inputs import RelationInputs, grad_buffers

# Scores that one block holds. CPU: the buffers shall stay in the cache, yet every operation on a block shall be worth
# starting threads for. ns a pair at A = 48, S = 512, (16, 8) for 2**17 to 2**21, the fastest of five turns on two cores
# that also did other work: 6.1, 5.1, 4.6, 4.7, 5.3. Their medians: 7.0, 5.7, 5.4, 5.8, 6.9.
# Accelerators: a block must fill the chip, and launches are what costs (an estimate, not measured).
_BLOCK_SCORES_CPU = 2**19
_BLOCK_SCORES_ACCELERATOR = 2**23
_BLOCK_ROWS = 128
_FEWEST_ROWS = 64  # a product over fewer rows costs more
_FEWEST_ITEMS = 4  # matrices of one product, where there are so many; no more threads than that can share it
_SUMMED_BY_ONE_THREAD = 2**14


def unavailable_reason() -> str | None:
    return None


def unsupported_reasons(problem: RelationInputs) -> list[str]:
    return []


def forward_reduced(problem: RelationInputs, weights: Tensor, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    values = torch.zeros(len(problem.relations), dtype=problem.dtype, device=problem.mask.device)
    grads = _zero_gradients(problem) if gradient else [[]] * len(problem.relations)
    for group in _groups(problem):
        row_weights = weights[group.sequences].repeat_interleave(problem.heads)[:, None].expand(-1, group.length)
        row_weights = group.zero_padding(row_weights)
        for r in range(len(problem.relations)):
            kl = _relation(problem, group, r, row_weights, grads[r], exact=not gradient)
            values[r] += _total(kl * row_weights)
    return values, [slot for slots in grads for slot in slots]


def forward_none(problem: RelationInputs) -> Tensor:
    shape = (len(problem.relations), *problem.mask.token_shape, problem.heads)
    out = torch.zeros(shape, dtype=problem.dtype, device=problem.mask.device)
    for group in _groups(problem):
        for r in range(len(problem.relations)):
            group.scatter(_relation(problem, group, r, None, [], exact=True)[..., None], out[r, ..., None])
    return out.transpose(-1, -2).contiguous()


def backward_none(problem: RelationInputs, row_grads: Tensor) -> list[Tensor]:
    grads = _zero_gradients(problem)
    for group in _groups(problem):
        for r in range(len(problem.relations)):
            row_weights = group.gather(row_grads[r].transpose(-1, -2)[..., None], problem.dtype)[..., 0]
            _relation(problem, group, r, group.zero_padding(row_weights), grads[r], exact=False)
    return [slot for slots in grads for slot in slots]


def _zero_gradients(problem: RelationInputs) -> list[list[Tensor]]:
    """Of each relation, its gradient slots."""
    grads: list[list[Tensor]] = [[] for _ in problem.relations]
    for r, m in grad_buffers(problem.relations):
        grads[r].append(
            torch.zeros_like(problem.student[m], dtype=problem.dtype, memory_format=torch.contiguous_format)
        )
    return grads


@dataclass(frozen=True)
class _Group:
    """n sequences of similar length, gathered to (n·A, L, D); rows and keys beyond a sequence's end are padding."""

    sequences: Tensor  # (n,) int64
    index: tuple[Tensor, ...]  # of the tokens, (n, L) together, into `token_shape`; padding repeats the last token
    length: int
    valid: Tensor | None  # (n, L) bool; None when there is no padding
    causal: bool
    prefix: Tensor | None  # (n,) int64, in gathered tokens
    longest_prefix: int

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, S, A, D) or (T, A, D) to (n·A, L, D)."""
        return x[self.index].transpose(1, 2).to(dtype).flatten(0, 1).contiguous()

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Writes (n·A, L, D) to the real tokens of `out`, (B, S, A, D) or (T, A, D)."""
        values = values.unflatten(0, (len(self.sequences), -1)).transpose(1, 2)  # (n, L, A, D)
        if self.valid is None:
            out[self.index] = values
        else:
            out[tuple(part.expand(self.valid.shape)[self.valid] for part in self.index)] = values[self.valid]

    def zero_padding(self, row_weights: Tensor) -> Tensor:
        if self.valid is None:
            return row_weights
        real = self.valid.repeat_interleave(row_weights.shape[0] // self.valid.shape[0], 0)
        return row_weights.masked_fill(~real, 0.0)

    def num_keys(self, rows_end: int) -> int:
        """How many keys the rows before `rows_end` can see."""
        if self.causal:
            return min(self.length, max(rows_end, self.longest_prefix))
        return self.length

    def hidden(self, rows: slice, items: slice, heads: int) -> Tensor | None:
        """(items or 1, rows, keys) bool: the keys that these rows may not see; None: they see all."""
        key = torch.arange(self.num_keys(rows.stop), device=self.sequences.device)
        hidden = None
        if self.causal:
            hidden = (key > torch.arange(rows.start, rows.stop, device=key.device)[:, None])[None]
            if self.prefix is not None:
                hidden = hidden & (key >= self.prefix[:, None])[:, None]
        if self.valid is not None:
            padding = ~self.valid[:, None, : len(key)]
            hidden = padding if hidden is None else hidden | padding
        if hidden is None or hidden.shape[0] == 1:
            return hidden
        return hidden[torch.arange(items.start, items.stop, device=key.device) // heads]


def _groups(problem: RelationInputs) -> Iterator[_Group]:
    """Sequences by falling length; short ones together as far as a block goes, long ones one by one."""
    mask = problem.mask
    tokens, starts, prefixes = mask.unpad()
    if mask.attention_mask is None and not mask.packed:  # no need to wait for an accelerator
        first = [n * mask.token_shape[1] for n in range(mask.num_sequences + 1)]
    else:
        mask.check_bounds()  # the host waits here in any case
        first = starts.tolist()
    lengths = [end - start for start, end in pairwise(first)]

    budget = _block_scores(mask.device)
    order = sorted((n for n in range(mask.num_sequences) if lengths[n]), key=lambda n: -lengths[n])
    while order:
        longest = lengths[order[0]]
        fit = max(1, budget // (problem.heads * longest * longest))
        members = [n for n in order[:fit] if 2 * lengths[n] > longest]
        order = order[len(members) :]

        def index(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=mask.device)

        sequences, ends = index(members), index([lengths[n] for n in members])[:, None]
        offsets = torch.arange(longest, device=mask.device)
        position = tokens[index([first[n] for n in members])[:, None] + offsets.minimum(ends - 1)]
        prefix = None if prefixes is None else prefixes[sequences]
        yield _Group(
            sequences=sequences,
            index=(position,) if mask.packed else (sequences[:, None], position),
            length=longest,
            valid=None if lengths[members[-1]] == longest else offsets < ends,
            causal=not mask.bidirectional,
            prefix=prefix,
            longest_prefix=0 if prefix is None else int(prefix.max()),
        )


def _block_scores(device: torch.device) -> int:
    return _BLOCK_SCORES_CPU if device.type == "cpu" else _BLOCK_SCORES_ACCELERATOR


def _relation(
    problem: RelationInputs, group: _Group, r: int, row_weights: Tensor | None, slots: list[Tensor], exact: bool
) -> Tensor:
    """(n·A, L): KL of a group's rows in relation r. Writes the gradient of their weighted sum to `slots`, if any."""
    query, key = relation = problem.relations[r]
    scale_t, scale_s = problem.scales(relation)
    k_t, k_s = (group.gather(side[key], problem.dtype) for side in (problem.teacher, problem.student))
    q_t, q_s = (
        (k_t, k_s)
        if query == key
        else (group.gather(side[query], problem.dtype) for side in (problem.teacher, problem.student))
    )
    q_t = q_t * scale_t
    items, length = q_s.shape[:2]
    kl = q_s.new_zeros(items, length)
    grads = [torch.zeros_like(q_s) for _ in slots]  # of the query, then of the key; one for both in a self relation

    scores = _block_scores(q_s.device)
    block_rows = min(length, _BLOCK_ROWS, max(_FEWEST_ROWS, scores // (2 * _FEWEST_ITEMS * length)))
    wanted = max(_FEWEST_ITEMS, scores // (block_rows * length))
    blocks = min(-(-items // wanted), max(1, items // _FEWEST_ITEMS))
    with _threads(items // blocks, q_s.device):
        for block in range(blocks):
            i = slice(items * block // blocks, items * (block + 1) // blocks)
            for start in range(0, length, block_rows):
                rows = slice(start, min(start + block_rows, length))
                keys = slice(group.num_keys(rows.stop))
                scores_t = torch.bmm(q_t[i, rows], k_t[i, keys].mT)
                scores_s = torch.bmm(q_s[i, rows] * scale_s, k_s[i, keys].mT)
                kl[i, rows], excess = _rows_of_block(scores_t, scores_s, group.hidden(rows, i, problem.heads), exact)
                if row_weights is not None and grads:
                    weights = row_weights[i, rows, None]
                    grads[0][i, rows] += torch.bmm(excess, k_s[i, keys]) * weights
                    grads[-1][i, keys] += torch.bmm(excess.mT, q_s[i, rows] * weights)
    for slot, grad in zip(slots, grads, strict=True):
        group.scatter(grad * scale_s, slot)
    return kl


@contextmanager
def _threads(most: int, device: torch.device) -> Iterator[None]:
    """At most so many threads on the CPU.

    A product of at least as many matrices as there are threads gives each thread whole matrices; one of fewer is
    split within the matrices, and then its bits depend on the number of threads.
    """
    found = torch.get_num_threads()
    if device.type != "cpu" or found <= most:
        yield
        return
    torch.set_num_threads(most)
    try:
        yield
    finally:
        torch.set_num_threads(found)


def _total(x: Tensor) -> Tensor:
    """The sum, in an order that does not depend on threads: PyTorch shares out what is large and has one result."""
    x = x.flatten()
    while x.numel() > _SUMMED_BY_ONE_THREAD:
        x = torch.nn.functional.pad(x, (0, -x.numel() % _SUMMED_BY_ONE_THREAD))
        x = x.unflatten(0, (-1, _SUMMED_BY_ONE_THREAD)).sum(-1)
    return x.sum()


def _rows_of_block(scores_t: Tensor, scores_s: Tensor, hidden: Tensor | None, exact: bool) -> tuple[Tensor, Tensor]:
    """(…, rows) KL and (…, rows, keys) q − p, the derivative of the row's KL by its student scores; overwrites scores.

    With δ = log q − log p, a row is Σ p·(e^δ − 1 − δ) = Σ (q − p) − Σ p·δ: in this form an error of the two
    log-sum-exps cancels in first order. What rounding is left in q − p matters for single rows of small KL; `exact`
    takes there, where |δ| < 1/4, the left-hand side.
    """
    if hidden is not None:
        scores_t.masked_fill_(hidden, -torch.inf)
        scores_s.masked_fill_(hidden, -torch.inf)
    log_p, log_q = scores_t.log_softmax(-1), scores_s.log_softmax(-1)
    delta = torch.sub(log_q, log_p, out=scores_s)
    if hidden is not None:
        delta.masked_fill_(hidden, 0.0)
    p = log_p.exp_()
    excess = log_q.exp_().sub_(p)
    if exact:
        small = p * (delta.expm1() - delta)
        kl = torch.where(delta.abs() < 0.25, small, excess - p * delta).sum(-1)
    else:
        kl = excess.sum(-1) - p.mul_(delta).sum(-1)
    return kl.clamp_(min=0.0), excess
