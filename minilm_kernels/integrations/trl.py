"""Relations in TRL's on-policy distillation of decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl import DistillationTrainer

from minilm_kernels.integrations.relation_term import Loss, RelationTerm, Rotary
from minilm_kernels.integrations.transformers import forget_evaluation

__all__ = ["RelationDistillationTrainer"]


class RelationDistillationTrainer(DistillationTrainer):
    """TRL's `DistillationTrainer` with a relation loss beside the divergence of the logits.

    The relation loss compares the rows of the generated tokens; the tokens of prompts and of tools' results are only
    keys. Both losses belong to the same forward of student and teacher. The trainer logs the relation loss as
    "relation_kl", without its weight.

    Micro-batches of a step, on one or several processes, have the gradient of one large batch. With
    `reduction="token"` each generated token counts the same, with "sequence" each completion.

    It overrides the private method `_compute_loss` of TRL 1.16.

    Args:
        relation_loss: `MiniLMLoss` or `MiniLMv2Loss` with reduction "sequence" or "token", or a dict of them, see
            `RelationTerm`.
        layers: the layers to compare, teacher's to student's; see `RelationTerm`.
        relation_weight: factor of the relation loss.
        args, kwargs: arguments of `DistillationTrainer`, such as `model`, `teacher_model` and `args`.

    Raises:
        ValueError: there is no teacher; the reduction is neither "sequence" nor "token". See also
            `RelationTerm`.

    Example:
        >>> from minilm_kernels import MiniLMv2Loss
        >>> from minilm_kernels.integrations import RelationDistillationTrainer
        >>> def train(student, teacher, tokenizer, prompts, arguments):
        ...     trainer = RelationDistillationTrainer(
        ...         student, teacher, arguments, prompts, processing_class=tokenizer,
        ...         relation_loss=MiniLMv2Loss(num_relation_heads=16, reduction="token"), relation_weight=0.1,
        ...     )
        ...     trainer.train()
        ...     return trainer.evaluate(prompts)["eval_relation_kl"]
    """

    def __init__(
        self,
        *args: Any,
        relation_loss: Loss | Mapping[Rotary, Loss],
        layers: Mapping[int, int] | None = None,
        relation_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.teacher_model is None:
            raise ValueError("teacher_model: expected a model or its name, got None")
        self.relation_term = RelationTerm(self.model, self.teacher_model, relation_loss, layers)
        self.relation_weight = relation_weight
        if (reduction := self.relation_term.reduction) not in ("sequence", "token"):
            raise ValueError(f'relation_loss: expected reduction "sequence" or "token", got {reduction!r}')

    def train(self, *args: Any, **options: Any) -> Any:
        forget_evaluation(self)
        return super().train(*args, **options)

    def _compute_loss(self, unwrapped_student: Any, inputs: dict, num_items_in_batch: Any) -> tuple[Tensor, ...]:
        self.relation_term.clear()  # the forwards of the generation
        loss, entropy_sum, num_rows = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        prompt, completion = inputs["prompt_mask"], inputs["completion_mask"]
        relation = self.relation_term.value(
            attention_mask=torch.cat([prompt, completion], 1),
            query_mask=torch.cat([torch.zeros_like(prompt), completion * inputs.get("tool_mask", 1)], 1),
        )
        self._relation = relation.detach()
        if self.model.training:  # the share of this micro-batch in the step, as the trainer does not divide the loss
            per_token, steps = self.relation_term.reduction == "token", self.current_gradient_accumulation_steps
            relation = relation * (num_rows / num_items_in_batch if per_token else 1 / steps)
        return loss + self.relation_weight * relation, entropy_sum, num_rows

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["relation_kl"].append(self.accelerator.gather_for_metrics(self._relation).mean().item())
        return result
