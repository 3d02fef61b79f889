"""The students of the two papers: sizes, training settings and published scores. This module does not import torch.

Sources, by the names that the table below uses:

- v1: MiniLM, arXiv 2002.10957 (settings in section 4.1, scores in tables 2, 3, 8, 11 and 13, sizes in tables 3, 4, 12)
- v2: MiniLMv2, arXiv 2012.15828 (settings of the students of BERT)
- README: github.com/microsoft/unilm, minilm/README.md (scores, sizes and speed of the MiniLMv2 students)

A figure without such a source is left out, and is None in a preset.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A published student, and how it was distilled.

    Attributes:
        method: "minilm" or "minilmv2".
        teacher: short name of the teacher, as in the preset's name.
        teacher_hub: name of the teacher on the Hugging Face hub; None if it was not published.
        family: model type, which also determines the vocabulary.
        teacher_layers, teacher_hidden_size: sizes of the teacher.
        teacher_layer: the distilled layer, counted from 1.
        relation_heads: number of relation heads, which for MiniLM are the attention heads.
        num_hidden_layers, hidden_size: sizes of the student.
        million_parameters: word embeddings and layers, see `parameter_count`.
        speedup: speed of inference relative to a 12 x 768 base model.
        total_batch_size, learning_rate, max_steps, adam_betas: training settings; None if not published.
        scores: published scores by task, averages over languages for XNLI and MLQA. SQuAD 2.0 and MLQA are F1.
        assistant: preset of the teacher assistant, through which this student is distilled; None if there is none.

    Example:
        >>> from minilm_kernels import PRESETS
        >>> preset = PRESETS["minilm-l6-h384-bert-base"]
        >>> preset.num_hidden_layers, preset.hidden_size, preset.relation_heads, preset.speedup
        (6, 384, 12, 5.3)
        >>> preset.scores, preset.assistant
        ({'MNLI-m': 82.4, 'SQuAD 2.0': 72.7}, 'minilm-l12-h384-bert-base')
    """

    method: str
    teacher: str
    teacher_hub: str | None
    family: str
    teacher_layers: int
    teacher_hidden_size: int
    teacher_layer: int
    relation_heads: int
    num_hidden_layers: int
    hidden_size: int
    million_parameters: int
    speedup: float
    total_batch_size: int | None
    learning_rate: float | None
    max_steps: int | None
    adam_betas: tuple[float, float] | None
    scores: Mapping[str, float]
    assistant: str | None


class _Teacher(NamedTuple):
    family: str
    hub: str | None
    layers: int
    hidden_size: int
    minilmv2_layer: int


_TEACHERS = {
    "bert-base": _Teacher("bert", "google-bert/bert-base-uncased", 12, 768, 12),
    "bert-large": _Teacher("bert", "google-bert/bert-large-uncased", 24, 1024, 21),
    "roberta-large": _Teacher("roberta", "FacebookAI/roberta-large", 24, 1024, 19),
    "xlm-roberta-base": _Teacher("xlm-roberta", "FacebookAI/xlm-roberta-base", 12, 768, 12),
    "xlm-roberta-large": _Teacher("xlm-roberta", "FacebookAI/xlm-roberta-large", 24, 1024, 19),
    "in-house-base": _Teacher("bert", None, 12, 768, 12),
}
_SPEEDUP = {(6, 768): 2.0, (12, 384): 2.7, (6, 384): 5.3, (4, 384): 7.8, (3, 384): 10.1}  # v1, README
_MILLIONS = {  # v1, README
    "bert": {(6, 768): 66, (12, 384): 33, (6, 384): 22, (4, 384): 19, (3, 384): 17},
    "roberta": {(6, 768): 81, (12, 384): 41, (6, 384): 30},
    "xlm-roberta": {(12, 384): 117, (6, 384): 107},
}

_Training = tuple[int, float, int, tuple[float, float]] | None  # batch, peak learning rate, steps, betas
_SMALL: _Training = (256, 3e-4, 400_000, (0.9, 0.999))  # v1: students of BERT that are narrower than it, assistants too
_V2: _Training = (256, 6e-4, 400_000, (0.9, 0.999))
# Method, teacher, layers, hidden size, training, scores. The scores of students that have an assistant are those of
# training through it. The assistant of BERT was not evaluated.
_STUDENTS: list[tuple[str, str, int, int, _Training, dict[str, float]]] = [
    ("minilm", "bert-base", 6, 768, (1024, 5e-4, 400_000, (0.9, 0.999)), {"MNLI-m": 84.0, "SQuAD 2.0": 76.4}),
    ("minilm", "bert-base", 12, 384, _SMALL, {}),
    ("minilm", "bert-base", 6, 384, _SMALL, {"MNLI-m": 82.4, "SQuAD 2.0": 72.7}),
    ("minilm", "bert-base", 4, 384, _SMALL, {"MNLI-m": 80.6, "SQuAD 2.0": 69.7}),
    ("minilm", "bert-base", 3, 384, _SMALL, {"MNLI-m": 79.1, "SQuAD 2.0": 66.9}),
    ("minilm", "in-house-base", 12, 384, (2048, 6e-4, 400_000, (0.9, 0.98)), {"MNLI-m": 85.7, "SQuAD 2.0": 81.7}),
    ("minilm", "in-house-base", 6, 384, (512, 4e-4, 400_000, (0.9, 0.98)), {"MNLI-m": 83.3, "SQuAD 2.0": 75.6}),
    ("minilm", "xlm-roberta-base", 12, 384, (256, 3e-4, 1_000_000, (0.9, 0.999)), {"XNLI": 71.1, "MLQA": 63.2}),
    ("minilm", "xlm-roberta-base", 6, 384, (512, 6e-4, 400_000, (0.9, 0.999)), {"XNLI": 68.0, "MLQA": 53.7}),
    ("minilmv2", "bert-base", 6, 768, _V2, {"MNLI-m": 84.2, "SQuAD 2.0": 76.3}),
    ("minilmv2", "bert-base", 6, 384, _V2, {"MNLI-m": 82.8, "SQuAD 2.0": 72.9}),
    ("minilmv2", "bert-large", 6, 768, _V2, {"MNLI-m": 85.0, "SQuAD 2.0": 77.7}),
    ("minilmv2", "bert-large", 6, 384, _V2, {"MNLI-m": 83.0, "SQuAD 2.0": 74.3}),
    ("minilmv2", "roberta-large", 6, 768, None, {"MNLI-m": 87.0, "SQuAD 2.0": 81.6}),
    ("minilmv2", "roberta-large", 12, 384, None, {"MNLI-m": 86.9, "SQuAD 2.0": 82.3}),
    ("minilmv2", "roberta-large", 6, 384, None, {"MNLI-m": 84.4, "SQuAD 2.0": 76.4}),
    ("minilmv2", "xlm-roberta-large", 12, 384, None, {"XNLI": 72.9, "MLQA": 64.9}),
    ("minilmv2", "xlm-roberta-large", 6, 384, None, {"XNLI": 69.3, "MLQA": 59.0}),
]


def _preset(
    method: str, teacher: str, layers: int, hidden: int, training: _Training, scores: dict[str, float]
) -> Preset:
    family, hub, teacher_layers, teacher_hidden, layer = _TEACHERS[teacher]
    heads = 64 if teacher_hidden == 1024 else 48
    if method == "minilm":
        layer, heads = teacher_layers, 12
    # Section 3.3 of MiniLM. MiniLMv2 has no assistants.
    assisted = method == "minilm" and 2 * layers <= teacher_layers and 2 * hidden <= teacher_hidden
    batch, rate, steps, betas = training or (None, None, None, None)
    return Preset(
        method=method,
        teacher=teacher,
        teacher_hub=hub,
        family=family,
        teacher_layers=teacher_layers,
        teacher_hidden_size=teacher_hidden,
        teacher_layer=layer,
        relation_heads=heads,
        num_hidden_layers=layers,
        hidden_size=hidden,
        million_parameters=_MILLIONS[family][layers, hidden],
        speedup=_SPEEDUP[layers, hidden],
        total_batch_size=batch,
        learning_rate=rate,
        max_steps=steps,
        adam_betas=betas,
        scores=scores,
        assistant=_name(method, teacher_layers, hidden, teacher) if assisted else None,
    )


def _name(method: str, layers: int, hidden: int, teacher: str) -> str:
    return f"{method}-l{layers}-h{hidden}-{teacher}"


PRESETS: dict[str, Preset] = {
    _name(method, layers, hidden, teacher): _preset(method, teacher, layers, hidden, training, scores)
    for method, teacher, layers, hidden, training, scores in _STUDENTS
}
"""The students of the papers by name, such as "minilmv2-l6-h384-roberta-large"."""
