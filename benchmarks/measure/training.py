"""One training step made of the parts of `minilm_kernels.distill`, timed by stage, and a float64 reference of it.

All layouts of a step share the models, the gradient buffer and the optimizer. Weights are random, because time does not
depend on them.
"""

from __future__ import annotations

import copy
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.providers import BACKENDS, PROVIDERS
from minilm_kernels.distill.bad_documents import BadDocuments
from minilm_kernels.distill.batch import Batch, LossWeights
from minilm_kernels.distill.config import DistillConfig
from minilm_kernels.distill.distributed import DistContext
from minilm_kernels.distill.gradients import SummedGradients
from minilm_kernels.distill.models import LayerModel, TeacherStudent
from minilm_kernels.distill.optimizer import learning_rate_at, make_optimizer
from minilm_kernels.distill.packing import PADDING, Packer, Samples
from minilm_kernels.distill.preparation import TokenFolder
from minilm_kernels.distill.sample_stream import Place, SampleStream
from minilm_kernels.distill.sources import open_sources
from minilm_kernels.distill.step import make_batch, seed_dropout, student_qkv, teacher_qkv
from minilm_kernels.distill.token_shards import TokenShards
from minilm_kernels.distill.tokenization import DocumentTokenizer
from minilm_kernels.losses import QKV, MiniLMv2Loss
from minilm_kernels.presets import PRESETS
from minilm_kernels.students import preset_config, random_student, student_config

from . import corpus
from .correctness import loss_and_gradients, relative
from .layouts import LAYOUTS
from .timed_loss import Result, gradients, leaves
from .timing import intervals, stamp
from .workload import Inputs, Loss, Workload

STAGES = ("data", "teacher", "student", "loss", "backward", "exchange", "optimizer")
RELATIONS = [("q", "q"), ("k", "k"), ("v", "v")]
_CHECKED = 3  # documents of the step that is compared with the reference
_REFERENCE_SCORES = 2**22
_SPARE = 4  # times as many documents in the shards as a step has on average, so that no step reaches their end


class ModelPair(NamedTuple):
    """Configs of student and teacher, the teacher's layer, and the relation heads of the loss."""

    student: Any
    teacher: Any
    layer: int
    heads: int


# Small models by (teacher, student) layers, hidden size and vocabulary, as fractions of BERT.
SMALL = {"tiny": ((3, 48), (2, 24), 200), "small": ((6, 384), (6, 384), 30522)}


def model_pair(name: str) -> ModelPair:
    """The models of a published student, or of `SMALL`."""
    if name in SMALL:
        (layers, hidden), sizes, vocabulary = SMALL[name]
        make = partial(student_config, preset_config("minilmv2-l6-h384-bert-base"), vocab_size=vocabulary)
        configs = make(*sizes, num_attention_heads=12), make(layers, hidden, num_attention_heads=12)
        return ModelPair(*configs, layers, 12)
    preset, student = PRESETS[name], preset_config(name)
    hidden = preset.teacher_hidden_size
    teacher = student_config(student, preset.teacher_layers, hidden, num_attention_heads=hidden // 64)
    return ModelPair(student, teacher, preset.teacher_layer, preset.relation_heads)


class Setting(NamedTuple):
    """A step to measure.

    Attributes:
        workload: the loss of full samples; its B and S are the samples of a pass and their tokens.
    """

    model: str
    layout: str
    workload: Workload

    @classmethod
    def parse(cls, text: str, layout: str, dtype: str, device: str) -> Setting:
        """Reads "MODEL:BxS"."""
        match = re.fullmatch(r"(.*):([1-9]\d*)x([1-9]\d*)", text)
        names = [name for name, preset in PRESETS.items() if preset.method == "minilmv2"] + list(SMALL)
        if match is None or match[1] not in names:
            raise ValueError(
                f"--shapes: this suite expects MODEL:BxS with MODEL one of {', '.join(names)}; got {text!r}"
            )
        pair = model_pair(match[1])
        widths = (pair.teacher.hidden_size // pair.heads, pair.student.hidden_size // pair.heads)
        mask = "packed" if LAYOUTS[layout].packing else "lengths"
        B, S = int(match[2]), int(match[3])
        return cls(match[1], layout, Workload(B, pair.heads, S, *widths, "qq,kk,vv", mask, dtype, device))


class Laps:
    """Wall clock (CUDA: device) and processor milliseconds between successive calls of `lap`, by stage.

    Processor time counts all threads of the process. On a machine that is shared with other work, it is steadier than
    the wall clock.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._stages: list[str] = []
        self._stamps, self._processor = [stamp(device)], [time.process_time()]

    def lap(self, stage: str) -> None:
        self._stages.append(stage)
        self._stamps.append(stamp(self._device))
        self._processor.append(time.process_time())

    def stages(self) -> tuple[dict[str, float], float]:
        """Milliseconds of each stage, and the processor's milliseconds of all of them."""
        found = dict.fromkeys(STAGES, 0.0)
        for stage, ms in zip(self._stages, intervals(self._stamps), strict=True):
            found[stage] += ms
        return found, 1e3 * (self._processor[-1] - self._processor[0])


class Parts:
    """Models, text, gradient buffer and optimizer, which all layouts of a model share.

    Args:
        model: a name of `model_pair`.
        dropout: dropout of the student.
        dist: rank, device and collectives.

    Attributes:
        embeddings: elements of the embeddings' gradient.
    """

    def __init__(self, model: str, dropout: float, dist: DistContext) -> None:
        self.pair, self.dist = copy.deepcopy(model_pair(model)), dist
        for config in self.pair[:2]:  # with BERT's 0.02, attention is nearly uniform and hides errors
            config.initializer_range = 2 * config.hidden_size**-0.5
        self.pair.student.update({"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout})
        vocabulary = self.pair.student.vocab_size
        self.tokenizer = DocumentTokenizer(corpus.tokenizer(vocabulary))
        teacher: Any = random_student(self.pair.teacher).eval().requires_grad_(False).to(dist.device)
        student: Any = random_student(self.pair.student, seed=1).train().to(dist.device)
        self._models = {(False, False): self._teacher_student(teacher, student)}
        self.config = DistillConfig(teacher="-", output_dir="-", student="-", text=("-",), dropout=dropout)
        trained = self.models().trained()
        parameters = list(trained.values())
        self.buffer = SummedGradients(parameters, 0, dist, getattr(torch, self.config.gradient_dtype))
        self.embeddings = sum(p.numel() for name, p in trained.items() if "embeddings" in name)
        self.optimizer = make_optimizer(self.config, parameters)
        self._folder = tempfile.TemporaryDirectory()
        self._references: dict[bytes, tuple[Tensor, Tensor]] = {}

    def _teacher_student(self, teacher: Any, student: Any) -> TeacherStudent:
        sides = LayerModel(teacher, self.pair.layer, None, "teacher"), LayerModel(student, -1, None, "student")
        return TeacherStudent(*sides, MiniLMv2Loss(self.pair.heads), tokenizer=None)

    def models(self, packed: bool = False, bf16: bool = False) -> TeacherStudent:
        """Both models; with packed attention, other modules with the same parameters."""
        if not packed:
            bf16 = False
        if (packed, bf16) not in self._models:
            plain = [side.model for side in (self._models[False, False].teacher, self._models[False, False].student)]
            shared = {id(x): x for model in plain for x in model.parameters()}
            made = self._teacher_student(*(copy.deepcopy(model, dict(shared)) for model in plain))
            for side in (made.teacher, made.student):
                side.use_packed_attention(bf16=bf16)
            self._models[packed, bf16] = made
        return self._models[packed, bf16]

    def shards(self, count: int, longest: int) -> TokenShards:
        """The token shards of `count` documents, cut at `longest` tokens."""
        folder = Path(self._folder.name, f"{count}-{longest}")
        if not folder.exists():
            lengths = np.minimum(corpus.document_lengths(count), longest)
            file = folder.with_suffix(".txt")
            file.write_text("\n\n".join(corpus.documents(lengths, self.pair.student.vocab_size)), encoding="ascii")
            for _ in TokenFolder(folder, open_sources([str(file)]), self.tokenizer, {}).prepare(BadDocuments()):
                pass
        return TokenShards(folder)

    def reference(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the documents of samples, each alone, in float64 and without the package's loss."""
        pieces = list(documents_of(samples))
        key = b"".join(piece.ids.tobytes() for piece in pieces)
        if key not in self._references:
            self._references[key] = self._reference(pieces)
        return self._references[key]

    def _reference(self, pieces: Sequence[Samples]) -> tuple[Tensor, Tensor]:
        models = self.models()
        teacher, student = (copy.deepcopy(side.model).double().eval() for side in (models.teacher, models.student))
        exact = self._teacher_student(teacher, student)
        parameters = list(exact.trained().values())
        total = torch.zeros((), dtype=torch.float64, device=self.dist.device)
        for piece in pieces:
            batch = Batch(piece, self.dist.device, packed=False)
            projected = student_qkv(exact, batch)
            inputs = loss_inputs(teacher_qkv(exact, batch), projected, self.pair.heads, {})
            value, grads = loss_and_gradients(inputs, _REFERENCE_SCORES)
            total += value / len(pieces)
            torch.autograd.backward(list(projected), [g.flatten(-2) / len(pieces) for g in grads])
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return total, torch.cat([grad.flatten() for grad in found])


def documents_of(samples: Samples) -> Iterator[Samples]:
    """Every document (or piece) of samples as one sample without padding."""
    for ids, positions in zip(*samples, strict=True):
        valid = positions != PADDING
        starts = np.flatnonzero(positions[valid] == 0)[1:]
        for part in zip(np.split(ids[valid], starts), np.split(positions[valid], starts), strict=True):
            yield Samples(*(x[None] for x in part))


def loss_inputs(teacher: QKV, student: QKV, heads: int, mask: dict[str, Any]) -> Inputs:
    """Projections as the inputs of a provider."""
    first, second = (
        {name: x.detach().unflatten(-1, (heads, -1)) for name, x in zip("qkv", side, strict=True)}
        for side in (teacher, student)
    )
    return Inputs(first, second, RELATIONS, mask)


class TrainStep:
    """A step of one layout with the loss of one provider. A call runs it.

    Args:
        parts: what the layouts share.
        provider: a provider of `PROVIDERS`; a backend of this package runs in the loss class of the training loop.
    """

    def __init__(self, parts: Parts, setting: Setting, provider: str) -> None:
        self.parts, self.setting, self.provider = parts, setting, provider
        self.layout, self.workload = LAYOUTS[setting.layout], setting.workload
        B, S = self.workload.B, self.workload.S
        self.config = replace(
            parts.config,
            packing=self.layout.packing,
            max_seq_length=S,
            total_batch_size=B,
            bf16=self.workload.dtype == "bfloat16",
            attention=self.layout.attention,
        )
        self._longest = S - len(parts.tokenizer.prefix) - len(parts.tokenizer.suffix)
        self._shards = parts.shards(_SPARE * B * S // min(S, corpus.MEAN) + _SPARE, self._longest)
        # The documents of B packed samples are the step of every layout.
        stream = self._stream(packing=True)
        stream.take(B)
        self.documents = max(1, stream.place.document)
        self._count = B if self.layout.packing else self.documents
        self._samples = self._stream(self.layout.packing)
        self._models = parts.models(self.layout.attention == "packed", self.config.bf16)
        self._micro = B
        self._step = 0

    def _stream(self, packing: bool) -> SampleStream:
        packer = Packer(self.parts.tokenizer, self.workload.S, packing)
        return SampleStream(self._shards, packer, eval_set=None, seed=self.config.seed)

    @cached_property
    def samples(self) -> Samples:
        return self.read()

    def read(self) -> Samples:
        """Reads the samples of the step, which are the first of an epoch."""
        self._samples.place = Place()
        samples = self._samples.take(self._count)
        if self.layout.sorted:
            order = np.argsort((samples.positions != PADDING).sum(1), kind="stable")
            samples = Samples(samples.ids[order], samples.positions[order])
        return samples

    def batch(self, samples: Samples, part: slice) -> Batch:
        """The batch of a part of the samples."""
        batch = make_batch(self.config, "bidirectional", samples, torch.device("cpu"), (0,), part)
        return batch.to(self.parts.dist.device)

    def __call__(self) -> Laps:
        laps = Laps(self.workload.device)
        samples = self.read()
        parts = self._parts_of(samples)
        buffer, optimizer = self.parts.buffer, self.parts.optimizer
        with buffer.summed():
            for number, (part, weight) in enumerate(parts):
                batch = self.batch(samples, part)
                laps.lap("data")
                seed_dropout(self.config.seed, self._step, part.start)
                if number == len(parts) - 1:
                    buffer.exchange_in_next_backward()
                self._accumulate(batch, weight, laps)
        laps.lap("exchange")
        buffer.clip_(self.config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(self.config, self._step)
        optimizer.step()
        self._step += 1
        laps.lap("optimizer")
        return laps

    def _parts_of(self, samples: Samples) -> list[tuple[slice, float]]:
        """The micro-batches of a step and the weights of their losses."""
        total = LossWeights.of(samples)
        slices = [slice(start, start + self._micro) for start in range(0, len(samples.ids), self._micro)]
        return [(part, LossWeights.of(samples.part(part)).weight("sequence", total)) for part in slices]

    def _accumulate(self, batch: Batch, weight: float, laps: Laps) -> Tensor:
        """Adds the gradient of a micro-batch to the buffer, and returns its weighted loss."""
        bf16 = self.config.bf16
        teacher = teacher_qkv(self._models, batch, bf16=bf16)
        laps.lap("teacher")
        student = student_qkv(self._models, batch, bf16=bf16)
        laps.lap("student")
        value, grads = self._loss_and_gradients(teacher, student, batch, weight)
        laps.lap("loss")
        torch.autograd.backward(list(student), grads)
        laps.lap("backward")
        return value

    def _loss_and_gradients(self, teacher: QKV, student: QKV, batch: Batch, weight: float) -> Result:
        """The weighted loss, and its gradients for the student's query, key and value."""
        if self.provider in BACKENDS:
            found = {name: x.detach().requires_grad_() for name, x in zip("qkv", student, strict=True)}
            loss = MiniLMv2Loss(self.parts.pair.heads, backend=self.provider)  # type: ignore[arg-type]
            values = loss.components(teacher, QKV(*found.values()), **batch.loss_arguments())
            return gradients(weight * torch.stack(list(values.values())).sum(), found)
        mask = {name: x for name, x in batch.loss_arguments().items() if x is not None and x is not False}
        inputs = loss_inputs(teacher, student, self.parts.pair.heads, mask)
        built: Loss = PROVIDERS[self.provider].build(inputs)
        heads = leaves(inputs)
        value, grads = gradients(weight * built(inputs.teacher, heads), heads)
        return value, [g.flatten(-2) for g in grads]

    def check(self) -> tuple[float, float]:
        """Relative errors of loss and gradient of the first documents in this layout, by `Parts.reference`."""
        longest = self.workload.S // _CHECKED - (self.workload.S - self._longest)
        packer = Packer(self.parts.tokenizer, self.workload.S, self.layout.packing)
        for document in range(_CHECKED):
            packer.add(self._shards.read(document)[:longest])
        packer.flush()
        checked = packer.samples
        self._models.student.model.eval()
        self.parts.buffer.zero_()
        laps = Laps(self.workload.device)
        parts = self._parts_of(checked)
        value = torch.stack([self._accumulate(self.batch(checked, part), weight, laps) for part, weight in parts]).sum()
        self._models.student.model.train()
        expected, grads = self.parts.reference(checked)
        return relative(value, expected), relative(self.parts.buffer.gradients, grads)

    @property
    def tokens(self) -> int:
        """Valid tokens of a step."""
        return int((self.samples.positions != PADDING).sum())

    def flops(self) -> int:
        """Floating-point operations of a step without padding: 12 hidden² weights a layer, and attention."""
        keys = np.array([piece.ids.size for piece in documents_of(self.samples)])
        pair = self.parts.pair
        tokens, squares = int(keys.sum()), int((keys**2).sum())

        def forward(hidden: int, layer: int) -> int:
            return tokens * ((layer - 1) * 24 * hidden**2 + 6 * hidden**2) + squares * (layer - 1) * 4 * hidden

        student = forward(pair.student.hidden_size, pair.student.num_hidden_layers)
        return forward(pair.teacher.hidden_size, pair.layer) + 3 * student
