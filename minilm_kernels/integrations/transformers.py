"""`RelationTrainer`: transformers' Trainer with a relation loss, alone or beside the loss of the student's own head."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from minilm_kernels._wrappers import unwrap
from minilm_kernels.integrations.relation_term import Loss, RelationTerm, Rotary

__all__ = ["RelationTrainer", "RelationTrainingArguments"]


@dataclass
class RelationTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, and the weights of the two losses.

    If `metric_for_best_model` is a relation KL, `greater_is_better` is False by default.

    Args:
        relation_weight: weight of the relation loss.
        model_loss_weight: weight of the student's own loss, such as masked language modeling. 0: the relation loss
            alone, for which neither labels nor a head are needed.

    Raises:
        ValueError: a weight is negative, or `relation_weight` is 0.

    Example:
        >>> from minilm_kernels.integrations import RelationTrainingArguments
        >>> RelationTrainingArguments("output", metric_for_best_model="relation_kl").greater_is_better
        False
    """

    relation_weight: float = field(default=1.0, metadata={"help": "Weight of the relation loss."})
    model_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the student's own loss; 0: the relation loss alone."}
    )

    def __post_init__(self) -> None:
        if not self.relation_weight > 0:
            raise ValueError(f"relation_weight: expected a number greater than 0, got {self.relation_weight!r}")
        if not self.model_loss_weight >= 0:
            raise ValueError(f"model_loss_weight: expected a number of 0 or more, got {self.model_loss_weight!r}")
        if self.greater_is_better is None and "relation_kl" in (self.metric_for_best_model or ""):
            self.greater_is_better = False
        super().__post_init__()


class RelationTrainer(Trainer):
    """transformers' Trainer for distillation: the relation loss alone, or beside the student's own loss.

    The loss is `relation_weight * relation + model_loss_weight * own`. Teacher and recorders stay outside the student,
    so that every checkpoint is the student's own: `AutoModel.from_pretrained(checkpoint)` loads it. Teacher and student
    see the same tokens, with a collator for masked language modeling the same masked tokens.

    Both losses are averages over the whole batch of an optimizer step: over all micro-batches of
    `gradient_accumulation_steps` and, with `average_tokens_across_devices` (the default), over all processes. The
    relation is averaged over sequences or rows, as its `reduction` says, and the student's own loss over labels. The
    latter therefore has to be an average over the labels other than -100, as that of masked and causal language models
    and of classifiers. Most heads of masked language models ignore `num_items_in_batch`, so that Trainer alone does not
    divide their loss by the accumulation steps; here, no head receives it.

    Training logs and `evaluate()` (with the prefix "eval_") contain `relation_kl`, the relation loss without its
    weight, each of its components, as in `relation_kl_qq`, and `model_loss`. They are averages over all batches and
    processes. A batch may have a `query_mask`, (B, S), nonzero on the rows that count.

    If the relation loss is alone, the student runs only as far as its layers are recorded, unless it is wrapped by
    torch.compile or for several processes. Parameters that it does not reach keep their values.

    Args:
        model: the student.
        args: the training arguments.
        teacher: the teacher; see `RelationTerm`. It is moved to the student's device and put in evaluation mode.
        relation_loss: `MiniLMLoss` or `MiniLMv2Loss` with the reduction "sequence" or "token", or a mapping as in
            `RelationTerm`.
        layers: the layers to compare, teacher's to student's; see `RelationTerm`.
        term_options: further arguments of `RelationTerm`, such as `rotary`.
        **options: the other arguments of Trainer.

    Attributes:
        term: the `RelationTerm`. `trainer.term.remove()` ends the recording of the student after the training.

    Raises:
        TypeError: `args` are no RelationTrainingArguments, or see `RelationTerm`.
        ValueError: several GPUs without a launcher, for which Trainer uses DataParallel; tensor, context or sequence
            parallelism; another reduction; teacher and student are one model, or have different vocabularies; or see
            `RelationTerm`.

    Example:
        >>> import torch
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> from minilm_kernels import MiniLMv2Loss
        >>> from minilm_kernels.integrations import RelationTrainer, RelationTrainingArguments
        >>> sizes = dict(vocab_size=100, num_attention_heads=2, intermediate_size=48)
        >>> teacher = BertModel(BertConfig(hidden_size=48, num_hidden_layers=4, **sizes))
        >>> student = BertModel(BertConfig(hidden_size=24, num_hidden_layers=2, **sizes))
        >>> data = [{"input_ids": torch.randint(100, (9,)), "attention_mask": torch.ones(9)} for _ in range(16)]
        >>> args = RelationTrainingArguments("output", max_steps=2, use_cpu=True, disable_tqdm=True, report_to="none")
        >>> trainer = RelationTrainer(
        ...     student, args, teacher=teacher, relation_loss=MiniLMv2Loss(4), layers={3: 2}, train_dataset=data
        ... )
        >>> trainer.train().global_step
        {'train_runtime': ...}
        2
        >>> AutoModel.from_pretrained("output/checkpoint-2").config.hidden_size
        24
    """

    args: RelationTrainingArguments
    model: Any
    _signature_columns: Any

    def __init__(
        self,
        model: nn.Module,
        args: RelationTrainingArguments,
        *,
        teacher: nn.Module,
        relation_loss: Loss | Mapping[Rotary, Loss],
        layers: Mapping[int, int] | None = None,
        term_options: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        if not isinstance(args, RelationTrainingArguments):
            raise TypeError(f"args: expected RelationTrainingArguments, got {type(args).__name__}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}; there is no model_init")
        if unwrap(teacher) is unwrap(model):
            raise ValueError("teacher: expected another model than the student, got the student")
        if args.n_gpu > 1:
            raise ValueError(
                f"args: {args.n_gpu} GPUs without a launcher, for which Trainer uses DataParallel, whose copies of the "
                "model cannot be recorded. Start the script with torchrun --nproc-per-node, or choose one GPU with "
                "CUDA_VISIBLE_DEVICES"
            )
        super().__init__(model, args, **options)
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError("args: tensor, context and sequence parallelism split what a relation needs in one piece")
        self._check_vocabularies(unwrap(model), unwrap(teacher))
        self.term = RelationTerm(self.model, teacher, relation_loss, layers, **(term_options or {}))
        self.term.num_items(torch.ones(1, 1))  # raises an error for reductions that are no averages
        alone = not args.model_loss_weight
        text = getattr(self.model, "main_input_name", None) == "input_ids"
        self._unreached = self._find_unreached() if alone and args.weight_decay and text else set()
        self._averages = _Averages()
        self._shifts = _shifts_labels(unwrap(model))
        # Trainer takes the losses as they are and does not divide them by the accumulation steps.
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs or self.compute_loss_func is None
        if alone and args.label_names is None:
            self.label_names, self.can_return_loss = [], True  # evaluation computes a loss without labels

    def _check_vocabularies(self, student: Any, teacher: Any) -> None:
        tokenizer: Any = self.processing_class
        sizes: list[Any] = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (teacher, student)]
        if sizes[0] != sizes[1] and None not in sizes and (tokenizer is None or len(tokenizer) > min(sizes)):
            raise ValueError(
                f"teacher: its vocabulary has {sizes[0]} tokens and that of the student {sizes[1]}, but both read the "
                "same input_ids. If only unused tokens make the difference, give the tokenizer as processing_class"
            )

    def train(self, *args: Any, **options: Any) -> TrainOutput:
        forget_evaluation(self)
        self._averages = _Averages()
        return super().train(*args, **options)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if name not in self._unreached]

    def _find_unreached(self) -> set[str]:
        """Names of the student's parameters on which the relation loss does not depend, found with two tokens.

        In a wrapped student their gradient is 0 instead of None, so that they would decay.
        """
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        batch: dict[str, Any] = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=self.args.device)}
        training = self.model.training
        with self.term.student_alone():
            self.model.eval()(**batch)
        self.model.train(training)
        self.term.run_teacher(**batch)
        gradients = torch.autograd.grad(self.term.value(), trained, allow_unused=True)
        reached = {id(p) for p, gradient in zip(trained, gradients, strict=True) if gradient is not None}
        return {name for name, parameter in parameters.items() if id(parameter) not in reached}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "query_mask" not in self._signature_columns:  # otherwise Trainer removes the column
            self._signature_columns.append("query_mask")

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        totals = sum((self._counts(batch) for batch in batches), torch.zeros(2, dtype=torch.long, device=device))
        self._replicas = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        if self._replicas > 1:
            totals = self.accelerator.reduce(totals)
        self._totals = totals.clamp(min=1)
        return batches, totals[0] if num_items is None else num_items

    def _counts(self, batch: Mapping[str, Any]) -> Tensor:
        """(2,): the items of the relation loss and those of the student's own loss in a micro-batch."""
        mask, labels = _attention_mask(batch), batch.get("labels")
        if labels is None:
            own = torch.tensor(len(mask))
        else:
            own = (labels[..., 1:] if self._shifts else labels).ne(-100).sum()
        relation = self.term.num_items(mask, batch.get("query_mask"))
        return torch.stack([count.to(self.args.device) for count in (relation, own)])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        counts = self._counts(inputs)
        # Gradients are summed up over micro-batches and averaged over processes.
        shares = counts / self._totals * self._replicas if model.training else torch.ones_like(counts)
        batch = {name: value for name, value in inputs.items() if name != "query_mask"}
        attention_mask, query_mask = inputs.get("attention_mask"), inputs.get("query_mask")
        if not model.training and self.accelerator.num_processes > 1:
            attention_mask = self._without_repeats(_attention_mask(inputs))
            counts[0] = self.term.num_items(attention_mask, query_mask)

        self.term.clear()  # forwards without a loss, such as those of generation
        with self.accelerator.autocast():
            self.term.run_teacher(**batch)
        own: Tensor | float = 0.0
        outputs = None
        if self.args.model_loss_weight:
            own, outputs = self._own_loss(model, batch, num_items_in_batch, counts[1], shares[1])
        else:
            batch.pop("labels", None)
            if model.training and model is self.model and self.accelerator.num_processes == 1:
                with self.term.student_alone():
                    model(**batch)
            else:
                outputs = model(**batch)
                if model.training:  # wrappers need a loss that depends on all outputs
                    own = 0.0 * sum(x.sum() for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad)
        components = self.term.components(attention_mask, query_mask=query_mask)
        relation = self.term.total(components)
        named = {f"relation_kl_{name.replace('/', '_')}": value for name, value in components.items()}
        self._averages.add({"relation_kl": relation, **named}, counts[0])
        loss = self.args.relation_weight * relation * shares[0] + own
        return (loss, outputs) if return_outputs else loss

    def _own_loss(
        self, model: nn.Module, batch: dict[str, Any], num_items: Tensor | int | None, count: Tensor, share: Tensor
    ) -> tuple[Tensor, Any]:
        """The weighted share of the student's own loss, and the student's outputs."""
        complete = self.compute_loss_func is not None  # the user's function divides by num_items_in_batch
        own, outputs = super().compute_loss(model, batch, True, num_items if complete else None)
        own = torch.where(count > 0, own, 0.0)  # an average over no labels is NaN
        scaled = own if complete else own * share
        self._averages.add({"model_loss": scaled / share.clamp(min=1e-9)}, count)
        return self.args.model_loss_weight * scaled, outputs

    def _without_repeats(self, mask: Tensor) -> Tensor:
        """Masks the samples with which accelerate completes the last batch of an evaluation in several processes."""
        rank = self.accelerator.process_index
        ranks = self.accelerator.gather_for_metrics(torch.full((len(mask),), rank, device=mask.device))
        own = torch.arange(len(mask), device=mask.device) < (ranks == rank).sum()
        return mask * own[:, None]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        training, self._averages = self._averages, _Averages()
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            averages = self._averages.pop(self.accelerator)
        finally:
            self._averages = training
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in averages.items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._averages.pop(self.accelerator))
        super().log(logs, start_time)


class _Averages:
    """Averages of values over the items of several batches and processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], count: Tensor) -> None:
        dtype = torch.float32 if count.device.type == "mps" else torch.float64
        for name, value in values.items():
            sums = torch.stack([value.detach() * count, count]).to(dtype)
            self._sums[name] = sums + self._sums.get(name, 0)

    def pop(self, accelerator: Any) -> dict[str, float]:
        """Returns the averages and starts new ones; every process has to call it."""
        sums, self._sums = self._sums, {}
        return {name: (total / count).item() for name, (total, count) in accelerator.reduce(sums, "sum").items()}


def _shifts_labels(model: Any) -> bool:
    """True if the head has the loss of causal language models, which leaves out the first label of a sequence.

    The class of the head does not tell: BART's decoder and T5 compute another loss than the one they are assigned.
    """
    computed_by = inspect.unwrap(type(model).forward).__code__.co_names
    return "loss_function" in computed_by and model.loss_function is ForCausalLMLoss


def _attention_mask(batch: Mapping[str, Any]) -> Tensor:
    """(B, S): the batch's own mask, or 1 everywhere."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask
    if "position_ids" in batch or "cu_seq_lens_q" in batch:
        raise ValueError(
            "batch: position_ids without attention_mask describe sequences behind one another in one row, in which "
            "relations would mix them. Use a collator that pads, such as DataCollatorWithPadding"
        )
    tokens = next(value for name, value in batch.items() if name != "labels")
    return torch.ones(tokens.shape[:2], device=tokens.device)


def forget_evaluation(trainer: Any) -> None:
    """Makes `train` wrap a student that was evaluated before.

    The evaluation marks the student as prepared, and accelerate would not wrap it any more: every process would train a
    student of its own.
    """
    wrapped = any(isinstance(module, DistributedDataParallel) for module in trainer.model_wrapped.modules())
    if not (wrapped or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        trainer.model_wrapped = trainer.model
        vars(trainer.model).pop("_is_accelerate_prepared", None)
