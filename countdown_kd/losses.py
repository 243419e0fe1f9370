"""TRL's distillation losses, with their values and gradients, in time and memory linear in the completion.

TRL's ULDLoss fills a matrix row by row, which makes its backward pass quadratic in the completion length, and keeps
some ten tensors of completion x vocabulary for it. Here the loss of a chunk of rows and its gradient are computed
together, in the forward pass, and only the gradient is kept. Logits may be given as hidden states and an output
layer (`Hidden`): then they exist for one chunk at a time only, and so does their gradient.

The derivation, for one aligned token. The student's distribution is A = c p: p = softmax(z / T) at the token's base
position, c the product of the probabilities of the other tokens that are merged into it (1 for most). With
g_j = A_j dL/dA_j and G = sum_j g_j, the chain rule through the softmax leaves

    dL/dz_j = (g_j - p_j G) / T             at the base position,
    dL/dz_j = (1[j = token] - p_j) G / T    at the position of a merged token,

so a row needs its probabilities and g, and nothing else. Arithmetic is fp32 whatever the logits' dtype: with bf16
logits the loss is closer to fp32's than TRL's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from trl.experimental.gold import GOLDTrainer
from trl.experimental.gold.gold_trainer import ULDLoss as TRLsULDLoss

EPS = 1e-8  # below it TRL cuts probabilities off
CHUNK = {"cpu": 2**20, "cuda": 2**27}  # numbers in a chunk of logits: on the CPU what its caches hold
CHUNK_OF_HIDDEN = CHUNK | {"cpu": 2**22}  # of which each reads the output layer's weights


class Hidden(NamedTuple):
    """Logits that are never whole: ``states @ weight.T``.

    ``states`` is (batch, sequence, width), the input of the output layer; ``weight`` is (vocabulary, width).
    """

    states: torch.Tensor
    weight: torch.Tensor


Logits = torch.Tensor | Hidden


class Rows(NamedTuple):
    """The aligned tokens of a batch, and where their probabilities come from. Positions count through the batch."""

    student: torch.Tensor  # (rows,) base positions
    teacher: torch.Tensor
    student_merged: Merged
    teacher_merged: Merged
    weight: torch.Tensor  # (rows,) of each row's loss in the whole
    last: slice  # the rows of the last sequence


class Merged(NamedTuple):
    """Tokens that are merged into others."""

    positions: torch.Tensor  # (merged,)
    tokens: torch.Tensor  # (merged,) their ids
    rows: torch.Tensor  # (merged,) the row that each is merged into


class Vocabularies(NamedTuple):
    """Columns that are compared one by one, and columns that are compared by rank. Slices where they can be."""

    student_matched: torch.Tensor | slice
    teacher_matched: torch.Tensor | slice
    student_unmatched: torch.Tensor | slice
    teacher_unmatched: torch.Tensor | slice
    matched_weight: float
    unmatched_weight: float


class ULDLoss(TRLsULDLoss):
    """TRL's universal logit distillation loss (https://huggingface.co/papers/2402.12030) and its hybrid form.

    Constructed and called like TRL's; ``student_logits`` and ``teacher_logits`` may also be `Hidden`. The teacher gets
    no gradient.
    """

    def __call__(self, student_logits: Logits, teacher_logits: Logits, student_labels, teacher_labels, *ids, **offsets):
        """The loss, a scalar. Logits are (batch, sequence, vocabulary), labels and ids (batch, sequence).

        Raises ValueError where byte offsets are needed and missing.
        """
        distillation = self._compute_distillation_loss(
            student_logits, teacher_logits, student_labels, teacher_labels, *ids, **offsets
        )
        if self.crossentropy_weight > 0:
            distillation = distillation + self.crossentropy_weight * cross_entropy(student_logits, student_labels)
        return distillation

    def _compute_distillation_loss(
        self,
        student_logits: Logits,
        teacher_logits: Logits,
        student_labels: torch.Tensor,
        teacher_labels: torch.Tensor,
        student_input_ids: torch.Tensor,
        teacher_input_ids: torch.Tensor,
        student_byte_offsets: torch.Tensor | None = None,
        teacher_byte_offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = self._rows(
            student_labels, teacher_labels, student_input_ids, teacher_input_ids, student_byte_offsets,
            teacher_byte_offsets,
        )  # fmt: skip
        if rows is None:
            return _tensor(student_logits).sum() * 0.0
        columns = self._columns(_size(student_logits), _size(teacher_logits))
        loss, matched, unmatched = _Distillation.apply(
            *_parts(student_logits), _detached(teacher_logits), rows, columns, self.beta, EPS,
            self.student_temperature, self.teacher_temperature,
        )  # fmt: skip
        if self._hybrid:
            number = rows.last.stop - rows.last.start
            self.last_matched_loss = matched[rows.last].sum() / number
            self.last_unmatched_loss = unmatched[rows.last].sum() / number
        return self.distillation_weight * loss

    def _get_start_and_size_answers(self, labels: torch.Tensor) -> tuple[list[int], list[int]]:
        """Where each completion begins, and its tokens; TRL waits for the device at every sequence."""
        completion = labels != self.ignore_index
        starts, sizes = torch.stack([completion.int().argmax(1), completion.sum(1)]).tolist()
        return starts, sizes

    @property
    def _hybrid(self) -> bool:
        return self.use_hybrid_loss and self._vocab_mapping is not None

    def _columns(self, student_size: int, teacher_size: int) -> Vocabularies:
        """Sorted out once for each pair of vocabulary sizes: TRL sorts at every call."""
        key = student_size, teacher_size
        if getattr(self, "_columns_of", None) != key:
            self._columns_of, self._kept_columns = key, self._sort_columns(*key)
        return self._kept_columns

    def _sort_columns(self, student_size: int, teacher_size: int) -> Vocabularies:
        if not self._hybrid:
            none = slice(0, 0)
            return Vocabularies(none, none, slice(0, student_size), slice(0, teacher_size), 0.0, 1.0)
        teacher = torch.tensor(sorted(self._teacher_matched_ids))
        student = self.mapping_tensor.cpu()[teacher]
        if self.hybrid_matched_weight is None:
            matched_weight = len(teacher) / max(1, teacher_size)
            unmatched_weight = 1.0 - matched_weight
        else:
            matched_weight, unmatched_weight = self.hybrid_matched_weight, self.hybrid_unmatched_weight
        others = [
            torch.ones(size, dtype=torch.bool).index_fill_(0, ids, False).nonzero().flatten()
            for size, ids in ((student_size, student), (teacher_size, teacher))
        ]
        if not all(map(len, others)):  # nothing to compare them with
            others = [ids[:0] for ids in others]
        ids = (_slice_if_possible(ids, self.device) for ids in (student, teacher, *others))
        return Vocabularies(*ids, matched_weight, unmatched_weight)

    def _rows(
        self, student_labels, teacher_labels, student_ids, teacher_ids, student_offsets, teacher_offsets
    ) -> Rows | None:
        """Which positions are compared with which; None if there is nothing to compare."""
        if self.use_extended_uld and (student_offsets is None or teacher_offsets is None):
            raise ValueError("Byte offsets are required when `use_extended_uld=True`.")
        bayesian = self.token_merge_strategy == "bayesian"
        spans = zip(
            *self._get_start_and_size_answers(student_labels), *self._get_start_and_size_answers(teacher_labels),
            strict=True,
        )  # fmt: skip
        base, merged, weights = ([], []), ([], []), []
        last = slice(0, 0)
        for i, (s_start, s_size, t_start, t_size) in enumerate(spans):
            s_size, t_size = s_size - self.skip_student_eos, t_size - self.skip_teacher_eos
            if s_size <= 0 or t_size <= 0:
                continue
            s, t = range(s_start, s_start + s_size), range(t_start, t_start + t_size)
            pairs = self._pairs(s, t, i, student_offsets, teacher_offsets)
            if bayesian and (s_start == 0 or t_start == 0):
                # No logits predict the first token of a sequence whose prompt was cut off.
                s, t = s[len(pairs[0][0]) :], t[len(pairs[0][1]) :]
                if not s or not t:
                    continue
                pairs = self._pairs(s, t, i, student_offsets, teacher_offsets)
            last = slice(len(weights), len(weights) + len(pairs))
            for groups in pairs:
                for side, (group, labels) in enumerate(zip(groups, (student_labels, teacher_labels), strict=True)):
                    first = i * labels.shape[1] - bayesian  # logits predict the next token
                    one, others = (group[-1], group[:-1]) if bayesian else (group[0], group[1:])
                    base[side].append(first + one)
                    merged[side].extend((first + each, i * labels.shape[1] + each, len(weights)) for each in others)
                weights.append(1 / (len(pairs) * len(student_labels)))
        if not weights:
            return None

        device = student_labels.device
        found = []
        for each, ids in zip(merged, (student_ids, teacher_ids), strict=True):
            positions, places, rows = torch.tensor(each, dtype=torch.long, device=device).reshape(-1, 3).unbind(1)
            found.append(Merged(positions, ids.flatten()[places], rows))
        return Rows(*(torch.tensor(each, device=device) for each in base), *found,
                    torch.tensor(weights, device=device), last)  # fmt: skip

    def _pairs(self, s: range, t: range, i: int, student_offsets, teacher_offsets) -> list[tuple[range, range]]:
        """The positions of sequence ``i`` that cover the same text on both sides."""
        if not self.use_extended_uld:
            return [(s[k : k + 1], t[k : k + 1]) for k in range(min(len(s), len(t)))]
        groups = self._align_by_byte_offsets(
            student_offsets[i, s.start : s.stop].tolist(), teacher_offsets[i, t.start : t.stop].tolist()
        )
        return [(s[a[0] : a[-1] + 1], t[b[0] : b[-1] + 1]) for a, b in zip(*groups, strict=True) if a and b]


def generalized_jsd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The generalised Jensen-Shannon divergence, eq. 1 of https://huggingface.co/papers/2306.13649, a scalar.

    Called like TRL's, which still does what is not a loss over logits: probabilities, and ``reduction="none"``. Logits
    are (batch, sequence, vocabulary) or `Hidden`; labels (batch, sequence), -100 where no loss is wanted.
    """
    if logits_are_probs or (reduction not in ("batchmean", "sum", "mean") and num_items_in_batch is None):
        return GOLDTrainer.generalized_jsd_loss(
            student_logits, teacher_logits, labels, beta, temperature, reduction, logits_are_probs, num_items_in_batch
        )
    tensor = _tensor(student_logits)
    if labels is None:
        positions = torch.arange(math.prod(tensor.shape[:-1]), device=tensor.device)
    else:
        positions = (labels.flatten() != -100).nonzero().flatten()
    if not len(positions):
        return tensor.sum() * 0.0
    if num_items_in_batch is not None:
        divisor = num_items_in_batch
    elif reduction == "batchmean":
        divisor = tensor.shape[0] if labels is None else len(positions)
    else:
        divisor = len(positions) * _size(student_logits) if reduction == "mean" else 1
    none = positions[:0]
    rows = Rows(
        positions, positions, Merged(none, none, none), Merged(none, none, none),
        torch.ones(len(positions), device=tensor.device), slice(0, 0),
    )  # fmt: skip
    every, nothing = slice(0, _size(student_logits)), slice(0, 0)
    columns = Vocabularies(every, every, nothing, nothing, 1.0, 0.0)
    loss, _, _ = _Distillation.apply(
        *_parts(student_logits), _detached(teacher_logits), rows, columns, beta, 0.0, temperature, temperature
    )
    return loss / divisor


def cross_entropy(logits: Logits, labels: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens that have a label. Of `Hidden`, a chunk's logits are made again for its gradient."""
    if isinstance(logits, torch.Tensor):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    states, targets = logits.states[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    wanted = (targets != -100).nonzero().flatten()

    def chunk(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(states[rows], weight).float(), targets[rows], reduction="sum")

    losses = [checkpoint(chunk, rows, logits.weight, use_reentrant=False) for rows in _chunks(wanted, logits)]
    return torch.stack(losses).sum() / len(wanted)


# ------------------------------------------------------------------------------------------------
# Loss and gradient, a chunk of rows at a time


class _Distillation(torch.autograd.Function):
    """Sum of the rows' losses, and each row's matched and unmatched part (without weights or gradient)."""

    @staticmethod
    def forward(ctx, tensor, weight, teacher, rows, columns, beta, eps, student_temperature, teacher_temperature):
        student, teacher = _as_autocast(tensor if weight is None else Hidden(tensor, weight)), _as_autocast(teacher)
        gradient = _Gradient(student, weight)
        with torch.autocast(tensor.device.type, enabled=False):
            return _Distillation._forward(
                ctx, student, gradient, teacher, rows, columns, beta, eps, student_temperature, teacher_temperature
            )

    @staticmethod
    def _forward(ctx, student, gradient, teacher, rows, columns, beta, eps, student_temperature, teacher_temperature):
        teacher_scale, _ = _merge(teacher, rows.teacher_merged, len(rows.weight), eps, teacher_temperature)
        scale, kept = _merge(student, rows.student_merged, len(rows.weight), eps, student_temperature)
        matched, unmatched, totals = (torch.zeros_like(scale) for _ in range(3))
        for chunk in _chunks(torch.arange(len(rows.weight), device=rows.weight.device), student, teacher):
            s = _logits(student, rows.student[chunk], student_temperature).log_softmax(-1)
            t = _logits(teacher, rows.teacher[chunk], teacher_temperature).log_softmax(-1)
            g = torch.zeros_like(s)
            row_weight = rows.weight[chunk, None]
            scales = scale[chunk, None], teacher_scale[chunk, None]
            if _any(columns.student_matched):
                part, d = _jsd(s[:, columns.student_matched], t[:, columns.teacher_matched], *scales, beta, eps)
                matched[chunk] = part
                _put(g, columns.student_matched, d, row_weight * columns.matched_weight)
            probabilities = s.exp_()
            if _any(columns.student_unmatched):
                a, b = probabilities[:, columns.student_unmatched], t[:, columns.teacher_unmatched].exp()
                part, d = _by_rank(*(each * factor.exp() for each, factor in zip((a, b), scales, strict=True)))
                unmatched[chunk] = part
                _put(g, columns.student_unmatched, d, row_weight * columns.unmatched_weight)
            totals[chunk] = g.sum(-1)
            g.addcmul_(probabilities, totals[chunk, None], value=-1)
            gradient.add(rows.student[chunk], g if student_temperature == 1 else g.div_(student_temperature))
        merged = rows.student_merged
        for chunk in _chunks(torch.arange(len(merged.rows), device=merged.rows.device), student):
            probabilities = _logits(student, merged.positions[chunk], student_temperature).softmax(-1)
            d = totals[merged.rows[chunk]] * kept[chunk] / student_temperature
            g = probabilities.mul_(-d[:, None])
            g.scatter_add_(1, merged.tokens[chunk, None], d[:, None])
            gradient.add(merged.positions[chunk], g)
        loss = columns.matched_weight * matched + columns.unmatched_weight * unmatched
        ctx.parts = gradient.parts
        ctx.mark_non_differentiable(matched, unmatched)
        return (loss * rows.weight).sum(), matched, unmatched

    @staticmethod
    def backward(ctx, grad, *_):
        # In place: at 2,000 tokens a copy is gigabytes. So there is one backward pass, as without retain_graph.
        parts, ctx.parts = ctx.parts, None
        if parts is None:
            raise RuntimeError(
                "the distillation loss has one backward pass; retain_graph=True does not give it another"
            )
        return *(None if part is None else part.mul_(grad) for part in parts), *[None] * 7


class _Gradient:
    """The gradient of logits, added up row by row: their own, or that of the hidden states and the output layer."""

    def __init__(self, student: Logits, weight: torch.Tensor | None):
        self.student = student
        self.parts = [
            None if part is None else torch.zeros_like(part, memory_format=torch.contiguous_format)
            for part in (_tensor(student), weight)
        ]

    def add(self, positions: torch.Tensor, rows: torch.Tensor) -> None:
        """``rows`` is (positions, vocabulary); no position comes twice."""
        tensor, weight = self.parts
        flat = tensor.view(-1, tensor.shape[-1])
        if weight is None:
            flat[positions] = rows.to(flat.dtype)
        else:
            rows = rows.to(self.student.weight.dtype)
            flat[positions] = (rows @ self.student.weight).to(flat.dtype)
            weight += rows.T @ _at(self.student.states, positions).to(rows.dtype)


def _jsd(s, t, scale, teacher_scale, beta: float, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's divergence of scaled distributions, and its derivative by the student's log-probabilities.

    ``s`` and ``t`` are log-probabilities (rows, columns), the scales logarithms (rows, 1). What is less than ``eps``
    counts as ``eps``, with derivative 0.
    """
    s, t = s + scale, t + teacher_scale
    above = None
    if eps:
        above = s >= math.log(eps)
        s, t = s.clamp_min_(math.log(eps)), t.clamp_min_(math.log(eps))
    if beta == 0:
        d = t.exp()
        loss = torch.linalg.vecdot(d, t - s)
        d.neg_()
    elif beta == 1:
        p = s.exp()
        apart = s - t
        loss = torch.linalg.vecdot(p, apart)
        d = apart.add_(1).mul_(p)
    else:
        mixture = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
        p, s_apart = s.exp(), s - mixture
        loss = beta * torch.linalg.vecdot(t.exp(), t - mixture) + (1 - beta) * torch.linalg.vecdot(p, s_apart)
        d = s_apart.mul_(p).mul_(1 - beta)
    return loss, d if above is None else d.mul_(above)


def _by_rank(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's L1 distance of sorted probabilities, and its derivative by the logarithms of ``a``."""
    number = a.shape[-1]
    size = max(number, b.shape[-1])
    ranked, order = a.sort(-1, descending=True)
    others = F.pad(b.sort(-1, descending=True).values, (0, size - b.shape[-1]))
    apart = F.pad(ranked, (0, size - number)) - others
    d = apart[:, :number].sign().mul_(ranked)
    return apart.abs().sum(-1), torch.empty_like(a).scatter_(1, order, d)


def _merge(logits: Logits, merged: Merged, rows: int, eps: float, temperature: float) -> tuple[torch.Tensor, ...]:
    """For each row the logarithm of what the tokens merged into it multiply it by; for each token whether it counts."""
    device = merged.rows.device
    scale = torch.zeros(rows, device=device)
    if not len(merged.rows):
        return scale, scale[:0]
    found = []
    for chunk in _chunks(torch.arange(len(merged.rows), device=device), logits):
        log_probabilities = _logits(logits, merged.positions[chunk], temperature).log_softmax(-1)
        found.append(log_probabilities.gather(1, merged.tokens[chunk, None])[:, 0])
    found = torch.cat(found)
    above = found >= math.log(eps)
    return scale.index_add_(0, merged.rows, found.clamp_min(math.log(eps)).float()), above.float()


def _logits(logits: Logits, positions: torch.Tensor, temperature: float) -> torch.Tensor:
    """(positions, vocabulary) in fp32, divided by the temperature."""
    if isinstance(logits, torch.Tensor):
        rows = _at(logits, positions)
    else:
        rows = F.linear(_at(logits.states, positions).to(logits.weight.dtype), logits.weight)
    return rows.float() if temperature == 1 else rows.float().div_(temperature)


def _as_autocast(logits: Logits) -> Logits:
    """With the output layer in the precision that autocast would compute it in. What follows it is fp32 anyway."""
    if isinstance(logits, torch.Tensor) or not torch.is_autocast_enabled(logits.states.device.type):
        return logits
    return Hidden(logits.states, logits.weight.to(torch.get_autocast_dtype(logits.states.device.type)))


def _at(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A copy of some positions. Not of a flat view, which a part of a larger tensor has not."""
    return tensor[positions // tensor.shape[1], positions % tensor.shape[1]]


def _chunks(rows: torch.Tensor, *logits: Logits) -> Iterator[torch.Tensor]:
    numbers = CHUNK_OF_HIDDEN if any(isinstance(each, Hidden) for each in logits) else CHUNK
    return iter(rows.split(max(1, numbers[rows.device.type] // _size(logits[0])))) if len(rows) else iter(())


def _put(g: torch.Tensor, columns: torch.Tensor | slice, values: torch.Tensor, weight: torch.Tensor) -> None:
    """``weight`` times ``values`` into columns of ``g``."""
    if isinstance(columns, slice):
        torch.mul(values, weight, out=g[:, columns])
    else:
        g.index_copy_(1, columns, values.mul_(weight))


def _any(columns: torch.Tensor | slice) -> bool:
    return columns.stop > columns.start if isinstance(columns, slice) else len(columns) > 0


def _slice_if_possible(ids: torch.Tensor, device: torch.device | str | None) -> torch.Tensor | slice:
    """Ids without a gap as a slice: columns that need not be gathered."""
    if not len(ids):
        return slice(0, 0)
    if torch.equal(ids, torch.arange(ids[0], ids[0] + len(ids))):
        return slice(int(ids[0]), int(ids[-1]) + 1)
    return ids.to(device)


def _parts(logits: Logits) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (logits, None) if isinstance(logits, torch.Tensor) else tuple(logits)


def _detached(logits: Logits) -> Logits:
    return logits.detach() if isinstance(logits, torch.Tensor) else Hidden(*(part.detach() for part in logits))


def _tensor(logits: Logits) -> torch.Tensor:
    return logits if isinstance(logits, torch.Tensor) else logits.states


def _size(logits: Logits) -> int:
    return logits.shape[-1] if isinstance(logits, torch.Tensor) else logits.weight.shape[0]
