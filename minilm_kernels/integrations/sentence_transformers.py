"""Relations in sentence-transformers: a loss for SentenceTransformerTrainer, and an evaluator that reports its KL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from torch import Tensor, nn

from minilm_kernels._wrappers import unwrap
from minilm_kernels.integrations.relation_term import Loss, RelationTerm, Rotary
from minilm_kernels.losses import MiniLMLoss

__all__ = ["RelationDistillLoss", "RelationKLEvaluator", "RelationSentenceTransformerTrainer"]

# Tokenizers with the same vocabulary can still differ, in their lower-casing for example.
_PROBE = "Two tokenizers, ONE vocabulary: naïve CAFÉ, 3½ km/h (№ 12-34)!"

_MINILM = """
@inproceedings{wang-2020-minilm,
    title = "{MiniLM}: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
    author = "Wang, Wenhui and Wei, Furu and Dong, Li and Bao, Hangbo and Yang, Nan and Zhou, Ming",
    booktitle = "Advances in Neural Information Processing Systems",
    volume = "33",
    year = "2020",
    url = "https://arxiv.org/abs/2002.10957",
}
"""
_MINILM_V2 = """
@inproceedings{wang-2021-minilmv2,
    title = "{MiniLMv2}: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
    author = "Wang, Wenhui and Bao, Hangbo and Huang, Shaohan and Dong, Li and Wei, Furu",
    booktitle = "Findings of the Association for Computational Linguistics: ACL-IJCNLP 2021",
    pages = "2140--2151",
    year = "2021",
    url = "https://arxiv.org/abs/2012.15828",
}
"""


class RelationDistillLoss(nn.Module):
    """A relation loss for SentenceTransformerTrainer, alone or beside a loss on the embeddings.

    `forward` returns a dict; the trainer minimizes the sum of its values and logs each. "relation" is
    `relation_weight` times the relation loss, the mean over the columns of the data set. "embedding" is the embedding
    loss; if that returns a dict, its own names are kept.

    Both models get the student's tokens, at most the student's `max_seq_length`. The teacher is not a submodule: it is
    in no optimizer, state dict or checkpoint, and `loss.to(...)` does not change it.

    SentenceTransformerTrainer takes the mean over the losses of the micro-batches. With `reduction="sequence"` and
    equally large micro-batches, they have the gradient of one large batch; use `RelationSentenceTransformerTrainer` for
    others.

    Without an embedding loss, gradients are 0 behind the last layer that is compared. Weight decay still changes these
    parameters.

    Args:
        model: the student, the model of the trainer. Remove layers from it before.
        teacher: a SentenceTransformer, or a transformers model with the tokenizer of the student.
        relation_loss: `MiniLMLoss` or `MiniLMv2Loss` with reduction "sequence" or "token".
        embedding_loss: a loss of sentence-transformers that has `compute_loss_from_embeddings`.
        relation_weight: factor of the relation loss.
        **options: options of `RelationTerm`, such as `layers={12: 6}`.

    Raises:
        TypeError: `model` is not a SentenceTransformer, or `teacher` is not a model.
        ValueError: the tokenizers of student and teacher differ; the student's `max_seq_length` exceeds the positions
            of the teacher; `embedding_loss` has to run the model itself, as the `Cached...` losses do; the reduction is
            neither "sequence" nor "token". See also `RelationTerm`.

    Example:
        >>> import tempfile
        >>> from sentence_transformers import SentenceTransformer
        >>> from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        >>> from transformers import BertConfig, BertModel, BertTokenizer
        >>> from minilm_kernels import MiniLMv2Loss
        >>> from minilm_kernels.integrations import RelationDistillLoss
        >>> words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two"])}
        >>> def tiny(hidden_size):
        ...     sizes = dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=len(words))
        ...     folder = tempfile.mkdtemp()
        ...     BertModel(BertConfig(hidden_size=hidden_size, **sizes)).save_pretrained(folder)
        ...     BertTokenizer(vocab=words).save_pretrained(folder)
        ...     return SentenceTransformer(folder, device="cpu")
        >>> teacher, student = tiny(48), tiny(24)
        >>> loss_fn = RelationDistillLoss(
        ...     student, teacher, MiniLMv2Loss(num_relation_heads=4),
        ...     embedding_loss=MultipleNegativesRankingLoss(student),
        ... )
        >>> columns = [student.preprocess(["one two", "two"]), student.preprocess(["one", "two two"])]
        >>> sorted(loss_fn(columns, labels=None))
        ['embedding', 'relation']
    """

    # The trainer replaces `model`, and the model card cites `loss`: both find them by name.
    model: Any
    loss: Any

    def __init__(
        self,
        model: SentenceTransformer,
        teacher: nn.Module,
        relation_loss: Loss | Mapping[Rotary, Loss],
        *,
        embedding_loss: nn.Module | None = None,
        relation_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_models(model, teacher)
        self.model = model
        if embedding_loss is not None:
            _check_embedding_loss(embedding_loss)
            self.loss = embedding_loss
        self.relation_weight = relation_weight
        # Neither the teacher nor the term is a submodule.
        self._options = {"teacher": unwrap(teacher), "loss": relation_loss, **options}
        self.term = RelationTerm(model, **self._options)
        if self.term.reduction not in ("sequence", "token"):
            raise ValueError(f'relation_loss: expected reduction "sequence" or "token", got {self.term.reduction!r}')
        self.items_per_micro_batch: Tensor | None = None  # (columns,), set by RelationSentenceTransformerTrainer

    def forward(
        self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Computes the losses of a batch.

        Args:
            sentence_features: the features of each column, as the model's `preprocess` returns them: `input_ids` and
                `attention_mask`, (B, S), and others.
            labels: labels of the embedding loss.

        Returns:
            "relation" and the components of the embedding loss, each a scalar.

        Raises:
            ValueError: a column is not text, or its sequences are flattened into one.
        """
        features = list(sentence_features)
        columns = [self.relation(column, self.model) for column in features]
        embeddings = [output["sentence_embedding"] for _, output in columns]
        values = torch.stack([value for value, _ in columns])
        if self.items_per_micro_batch is not None and torch.is_grad_enabled():
            values = values * (self.num_items(features).to(values) / self.items_per_micro_batch)
        relation = self.relation_weight * values.mean()
        if not hasattr(self, "loss"):
            # The loss has to depend on the model's output in distributed training, see record_qkv.
            return {"relation": relation + 0.0 * sum(x.float().sum() for x in embeddings)}
        targets: Any = labels
        if labels is not None and isinstance(self.loss, EmbedDistillLoss):  # its forward makes this list of the labels
            targets = labels.unbind(1) if labels.dim() == 3 else [labels] * len(embeddings)
        embedding = self.loss.compute_loss_from_embeddings(embeddings, targets)
        return {"relation": relation, **(embedding if isinstance(embedding, dict) else {"embedding": embedding})}

    def relation(self, features: Mapping[str, Any], model: nn.Module) -> tuple[Tensor, dict[str, Any]]:
        """The relation loss of one column, without its weight, and the output of `model`, the student."""
        if "attention_mask" not in features:
            raise ValueError(
                "sentence_features: expected input_ids and attention_mask of text, got "
                f"{', '.join(features)}. Flattened sentences are not supported: set model[0].unpad_inputs = False"
            )
        if unwrap(model, runs_whole=True) is not unwrap(self.term.student, runs_whole=True):
            self.term.remove()  # the trainer has replaced the model, see its `model_init`
            self.term = RelationTerm(model, **self._options)
        self.term.clear()  # the forwards of evaluators
        self.term.run_teacher(**features)
        output = model(dict(features))
        return self.term.value(features["attention_mask"]), output

    def num_items(self, sentence_features: Iterable[Mapping[str, Any]]) -> Tensor:
        """The number of items over which the relation loss averages in each column, (columns,)."""
        return torch.stack([self.term.num_items(column["attention_mask"]) for column in sentence_features])

    def get_config_dict(self) -> dict[str, Any]:
        """The settings that the model card lists."""
        options = {name: value for name, value in self._options.items() if name not in ("teacher", "loss")}
        return {"relation_loss": repr(self._options["loss"]), **options, "relation_weight": self.relation_weight}

    @property
    def citation(self) -> str:
        """The paper of the relation loss in BibTeX, for the model card."""
        return _MINILM if isinstance(self._options["loss"], MiniLMLoss) else _MINILM_V2


class RelationSentenceTransformerTrainer(SentenceTransformerTrainer):
    """SentenceTransformerTrainer whose relation loss is exact for micro-batches of any size.

    The relation loss of a step is the mean over its sentences, or with reduction "token" over its tokens, however they
    are divided into micro-batches and processes. SentenceTransformerTrainer weights every micro-batch equally, although
    the last one of an epoch is often smaller. The embedding loss is weighted as there. Arguments are those of
    SentenceTransformerTrainer; `loss` is a `RelationDistillLoss`.

    Raises:
        TypeError: `loss` is not a `RelationDistillLoss`.

    Example:
        >>> from minilm_kernels.integrations import RelationDistillLoss, RelationSentenceTransformerTrainer
        >>> def train(student, teacher, relation_loss, args, sentences):
        ...     loss = RelationDistillLoss(student, teacher, relation_loss)
        ...     RelationSentenceTransformerTrainer(student, args, train_dataset=sentences, loss=loss).train()
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.loss, RelationDistillLoss):
            raise TypeError(f"loss: expected a RelationDistillLoss, got {type(self.loss).__name__}")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self.loss.items_per_micro_batch = None  # another trainer may get the loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            totals = sum(self.loss.num_items(self.collect_features(batch)[0]).to(device) for batch in batches)
            micro_batches = len(batches) * self.accelerator.num_processes
            self.loss.items_per_micro_batch = self.accelerator.reduce(totals) / micro_batches
        return batches, num_items


class RelationKLEvaluator(BaseEvaluator):
    """Evaluates a relation loss on sentences, such as some that are kept out of training.

    A call returns `{"relation_kl": ...}`, the mean over all sentences. With reduction "token", it is the mean over all
    tokens.

    Args:
        sentences: the sentences. They are tokenized with the tokenizer of the student.
        loss: the loss whose teacher, relations and layers are used.
        batch_size: number of sentences that the models process at once.
        name: prefix of the metric's name.

    Raises:
        ValueError: there are no sentences.

    Example:
        >>> from sentence_transformers import SentenceTransformerTrainer
        >>> from minilm_kernels.integrations import RelationDistillLoss, RelationKLEvaluator
        >>> def train(student, teacher, relation_loss, sentences, eval_sentences):
        ...     loss = RelationDistillLoss(student, teacher, relation_loss)
        ...     evaluator = RelationKLEvaluator(eval_sentences, loss)
        ...     before = evaluator(student)["relation_kl"]
        ...     SentenceTransformerTrainer(student, train_dataset=sentences, loss=loss, evaluator=evaluator).train()
        ...     return before, evaluator(student)["relation_kl"]
    """

    def __init__(
        self, sentences: Sequence[str], loss: RelationDistillLoss, batch_size: int = 32, name: str = ""
    ) -> None:
        super().__init__()
        if not sentences or isinstance(sentences, str):
            raise ValueError(f"sentences: expected a list of at least one sentence, got {sentences!r}")
        self.sentences, self.loss, self.batch_size, self.name = sentences, loss, batch_size, name
        self.greater_is_better = False
        self.primary_metric = "relation_kl"

    @torch.no_grad()
    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        total, weight = 0.0, 0
        training = model.training
        model.eval()
        for start in range(0, len(self.sentences), self.batch_size):
            features = model.preprocess(self.sentences[start : start + self.batch_size])
            features = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in features.items()}
            value, _ = self.loss.relation(features, model)
            items = int(self.loss.term.num_items(features["attention_mask"]))
            total, weight = total + items * value.item(), weight + items
        model.train(training)
        metrics = self.prefix_name_to_metrics({"relation_kl": total / weight}, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics


def _check_models(model: Any, teacher: Any) -> None:
    """Checks that the teacher understands the student's tokens."""
    if not isinstance(model, SentenceTransformer):
        raise TypeError(
            f"model: expected a SentenceTransformer, got {type(model).__name__}. SentenceTransformer(path) makes one "
            "of any transformers model; RelationTrainer trains models without it"
        )
    if not isinstance(teacher, nn.Module):
        raise TypeError(
            f"teacher: expected a SentenceTransformer or a transformers model, got {type(teacher).__name__}"
        )
    own, other = model.tokenizer, getattr(teacher, "tokenizer", None)
    if other is not None and (own.get_vocab() != other.get_vocab() or own(_PROBE).input_ids != other(_PROBE).input_ids):
        raise ValueError(
            f"teacher: its tokenizer ({len(other)} tokens) differs from the student's ({len(own)} tokens). Relations "
            "compare the same tokens of both models, so that both need one tokenizer"
        )
    plain: Any = unwrap(teacher)
    rows = plain.get_input_embeddings().num_embeddings
    if len(own) > rows:
        raise ValueError(f"teacher: the student's tokenizer has {len(own)} tokens, the teacher's embedding {rows} rows")
    positions = getattr(plain.config, "max_position_embeddings", None)
    if positions and (model.max_seq_length or 0) > positions:
        raise ValueError(
            f"model: its max_seq_length is {model.max_seq_length}, but the teacher has only {positions} positions. Set "
            f"model.max_seq_length = {positions} or less"
        )


def _check_embedding_loss(embedding_loss: Any) -> None:
    name = type(embedding_loss).__name__
    if getattr(embedding_loss, "uses_gradient_cache", False):
        raise ValueError(
            f"embedding_loss: {name} runs the model without gradients, and again in the backward, so that the "
            "relations have no gradient. Use the loss without cache, such as MultipleNegativesRankingLoss"
        )
    if not hasattr(embedding_loss, "compute_loss_from_embeddings"):
        raise ValueError(
            f"embedding_loss: {name} has no compute_loss_from_embeddings, so that it would run the model a second time"
        )
