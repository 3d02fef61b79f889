"""`RunState`: everything that changes during a run, and how it is saved in a checkpoint and restored from one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from .checkpoint import Checkpoint, damaged
from .conditions import condition_changes
from .config import DistillConfig
from .console import say
from .distributed import DistContext
from .models import TeacherStudent
from .prefetch import Prefetcher
from .run_folder import refuse_differences
from .sharding import placed

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class RunState:
    """The state of a run on one process.

    Attributes:
        parameters: the student's trained parameters by name, in the order of the optimizer's groups.
        teacher_digests: SHA-256 of the teacher's files; `None` on processes that do not compute it.
        conditions: machine and versions, see `conditions`.
        step: number of finished steps.
        tokens: number of tokens in these steps.
        micro_batch: number of samples that each process computes at once; it is halved when memory runs out.
        eval_pending: the student has not been evaluated at `step`.
        best_step, best_loss: with `--load-best-model-at-end`, the step with the lowest eval loss, and this loss; `None`
            before the first evaluation of a trained student.
        window: for each step since the last line of metrics, the loss of each relation and the norm of the gradient,
            (relations + 1,).
    """

    config: DistillConfig
    dist: DistContext
    models: TeacherStudent
    stream: Prefetcher
    optimizer: torch.optim.AdamW
    parameters: dict[str, nn.Parameter]
    teacher_digests: dict[str, str] | None
    conditions: dict[str, Any]
    step: int = 0
    tokens: int = 0
    eval_pending: bool = True
    best_step: int | None = None
    best_loss: float | None = None
    window: list[Tensor] = field(default_factory=list)
    micro_batch: int = field(init=False)

    def __post_init__(self) -> None:
        self.micro_batch = self.config.micro_batch(self.dist.world_size)

    def finite_window(self) -> Tensor:
        """The attribute `window` as one tensor, (steps, relations + 1) float32 on the CPU.

        Raises:
            RuntimeError: a loss or a gradient was not finite.
        """
        columns = len(self.models.loss.relations) + 1
        window = torch.stack(self.window).cpu() if self.window else torch.empty(0, columns)
        if not window.isfinite().all():
            bad = self.step - len(window) + 1 + int((~window.isfinite()).any(1).nonzero()[0])
            raise RuntimeError(
                f"loss or gradient was not finite at step {bad}, and no checkpoint was written since; start again in "
                "another --output-dir with a lower --learning-rate, a longer --warmup-steps or without --bf16"
            )
        return window

    def weights(self) -> dict[str, Tensor]:
        """The student's weights on the CPU of the main process; all processes must call it, and others get none."""
        return cast("dict[str, Tensor]", get_model_state_dict(self.models.student.model, options=_WHOLE))

    def checkpoint(self) -> Checkpoint:
        """The state as a checkpoint. It does not depend on the number of processes, which must all call this method."""
        data_state, data = self.stream.state()
        kept = self.models.vocabulary
        vocabulary = {} if kept is None else {"vocabulary": kept.teacher_ids}
        found: dict[str, Any]  # name of a parameter to its state
        found = get_optimizer_state_dict(self.models.student.model, self.optimizer, options=_WHOLE).get("state", {})  # type: ignore[assignment]
        moments = {f"{name}.{key}": torch.as_tensor(x) for name, state in found.items() for key, x in state.items()}
        return Checkpoint(
            self.step,
            {
                "settings": self.config.as_dict(),
                "tokens": self.tokens,
                "micro_batch": self.micro_batch,
                "eval_pending": self.eval_pending,
                "best_step": self.best_step,
                "best_loss": self.best_loss,
                "teacher": self.teacher_digests,
                "conditions": self.conditions,
                "data": data_state,
            },
            {
                "model": self.weights(),
                "optimizer": moments,
                "data": data,
                "progress": {"window": self.finite_window(), **vocabulary},
            },
        )

    def load(self, saved: Checkpoint) -> None:
        """Restores the state of a checkpoint.

        Raises:
            ValueError: the checkpoint is damaged, it is of a run with other settings, or teacher or text have changed.
        """
        try:
            self._load(saved)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise damaged(saved.folder, error) from error

    def _load(self, saved: Checkpoint) -> None:
        # The folder may contain a checkpoint of another run.
        refuse_differences(self.config, self.config.differences(saved.state["settings"]))
        before = saved.state["teacher"]
        if self.teacher_digests is not None and before != self.teacher_digests:
            now = self.teacher_digests
            changed = sorted(file for file in {*before, *now} if before.get(file) != now.get(file))
            raise ValueError(
                f"--resume-from-checkpoint: --teacher {self.config.teacher} has changed since the checkpoint "
                f"({', '.join(changed)}); restore the teacher, or start again in another --output-dir"
            )
        if self.dist.is_main:
            for warning in condition_changes(saved.state["conditions"], self.conditions):
                say(warning)
        self._check(saved)
        self.step = saved.step
        self.tokens = saved.state["tokens"]
        self.micro_batch = min(saved.state["micro_batch"], self.micro_batch)  # there may be more processes now
        self.eval_pending = saved.state["eval_pending"]
        self.best_step, self.best_loss = saved.state["best_step"], saved.state["best_loss"]
        student = self.models.student.model
        own = student.state_dict()
        student.load_state_dict({name: placed(tensor, own[name]) for name, tensor in saved.tensors["model"].items()})
        moments: dict[int, dict[str, Tensor]] = {}
        index = {
            id(value): i for i, value in enumerate(p for group in self.optimizer.param_groups for p in group["params"])
        }
        for key, tensor in saved.tensors["optimizer"].items():
            name, _, moment = key.rpartition(".")
            parameter = self.parameters[name]
            moments.setdefault(index[id(parameter)], {})[moment] = placed(tensor, parameter if tensor.dim() else tensor)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.stream.load_state(saved.state["data"], saved.tensors["data"])
        progress = saved.tensors["progress"]
        self.window = list(progress["window"].to(self.dist.device))

    def _check(self, saved: Checkpoint) -> None:
        """Raises `ValueError` if the content of the checkpoint does not fit this run."""
        config = self.config

        def expect(right: bool, problem: str) -> None:
            if not right:
                raise damaged(saved.folder, ValueError(problem))

        expect(0 < saved.step <= config.max_steps, f"step {saved.step} is not among the {config.max_steps} --max-steps")
        for name, kind in (("tokens", int), ("micro_batch", int), ("eval_pending", bool), ("data", dict)):
            value = saved.state[name]
            expect(type(value) is kind, f"{name} is {value!r}")
        best = saved.state["best_step"], saved.state["best_loss"]
        known = type(best[0]) is int and 0 < best[0] <= saved.step and type(best[1]) is float
        expect(best == (None, None) or known, f"best_step and best_loss are {best!r}")
        micro = saved.state["micro_batch"]
        expect(0 < micro <= config.total_batch_size, f"micro_batch is {micro}")
        moments = {
            f"{name}.{moment}": shape
            for name, parameter in self.parameters.items()
            for moment, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape))
        }
        found = {name: tensor.shape for name, tensor in saved.tensors["optimizer"].items()}
        expect(found == moments, "the state of the optimizer does not fit the student")
        window = saved.tensors["progress"]["window"]
        columns = len(self.models.loss.relations) + 1
        expect(window.dim() == 2 and window.shape[1] == columns, f"window has shape {tuple(window.shape)}")
        words = self.models.teacher.model.get_input_embeddings().weight.shape[0]
        data = saved.tensors["data"]
        if "eval.ids" in data:
            ids, positions = data["eval.ids"], data["eval.positions"]
            expect(
                ids.shape == positions.shape
                and ids.shape[1:] == (config.max_seq_length,)
                and ids.dtype == positions.dtype == torch.int32
                and bool(ids.min() >= 0 and ids.max() < words),
                "eval has no token ids of this tokenizer",
            )
