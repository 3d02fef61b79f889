"""The benchmarks on which the MiniLM papers fine-tune: data sets, columns, metrics and hyper-parameters.

Source of the hyper-parameters: MiniLM, arXiv:2002.10957, appendix B. No torch is imported, so that the command line can
list the tasks at once.
"""

from __future__ import annotations

from dataclasses import dataclass

_GLUE = "nyu-mll/glue"
XNLI_LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        dataset: path of the data set on the Hugging Face hub.
        config: its configuration.
        columns: the column of the text, or those of the two texts.
        labels: number of classes; 1 for a regression, 0 for question answering.
        metrics: names of the metrics; the first one is the score.
        split: the split that is evaluated. The test labels are not public, and the papers report this split.
        learning_rates, epochs: the grid; the combination with the best mean score is reported.
        batch_size: examples of an optimizer step.
        max_tokens: longer inputs are truncated; a context of question answering is cut into overlapping parts.
    """

    dataset: str
    config: str | None
    columns: tuple[str, ...]
    labels: int
    metrics: tuple[str, ...]
    split: str = "validation"
    learning_rates: tuple[float, ...] = (2e-5, 3e-5, 4e-5, 5e-5)
    epochs: tuple[int, ...] = (3, 4, 5)
    batch_size: int = 32
    max_tokens: int = 128


_LONGER = (3, 4, 5, 10)  # "up to 10 epochs" for CoLA, RTE and MRPC

TASKS = {
    "cola": Task(_GLUE, "cola", ("sentence",), 2, ("matthews_correlation",), epochs=_LONGER),
    "sst2": Task(_GLUE, "sst2", ("sentence",), 2, ("accuracy",)),
    "mrpc": Task(_GLUE, "mrpc", ("sentence1", "sentence2"), 2, ("accuracy", "f1"), epochs=_LONGER),
    "stsb": Task(_GLUE, "stsb", ("sentence1", "sentence2"), 1, ("pearson", "spearman")),
    "qqp": Task(_GLUE, "qqp", ("question1", "question2"), 2, ("accuracy", "f1")),
    "mnli": Task(_GLUE, "mnli", ("premise", "hypothesis"), 3, ("accuracy",), split="validation_matched"),
    "qnli": Task(_GLUE, "qnli", ("question", "sentence"), 2, ("accuracy",)),
    "rte": Task(_GLUE, "rte", ("sentence1", "sentence2"), 2, ("accuracy",), epochs=_LONGER),
    "squad_v2": Task(
        "rajpurkar/squad_v2", None, ("question", "context"), 0, ("f1", "exact_match"),
        learning_rates=(6e-5,), epochs=(3,), max_tokens=384,
    ),
    "xnli": Task(
        "facebook/xnli", "en", ("premise", "hypothesis"), 3, ("accuracy",),
        learning_rates=(3e-5, 4e-5, 5e-5, 6e-5), epochs=(5,), batch_size=128,
    ),
}  # fmt: skip
