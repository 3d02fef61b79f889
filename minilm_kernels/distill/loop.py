"""The distillation loop: steps with the exact global average, held-out losses, checkpoints and resuming."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bad_documents import BadDocuments
from .batch import Counts
from .checkpoint import Checkpoint, Checkpoints, remove_unfinished, write_file
from .config import DistillConfig
from .data import HeldOut, Packer, RowStream, Tokenizer, collect_heldout
from .evaluation import components, heldout_loss, make_batch
from .models import Pair, load_pair
from .preflight import check_saving, check_text
from .processes import Processes
from .report import Metrics, Progress, heldout_records
from .result import write_result
from .sources import HubDataset, Source, open_sources
from .stopping import StopSignals

SETTINGS = "settings.json"


@dataclass(frozen=True)
class DistillResult:
    """How a run ended.

    Attributes:
        student: folder of the finished student, for `AutoModel` and `AutoTokenizer`; `None` if the run was stopped.
        metrics: metrics.jsonl, one object a line: `step`, `split` ("train" or "heldout"), `loss`, each relation.
        step: optimizer steps done.
        heldout_before, heldout_after: first and last held-out record, `None` if nothing is held out.
        stopped_by: number of the signal that stopped the run, `None` if it is finished.
    """

    student: Path | None
    metrics: Path
    step: int
    heldout_before: dict[str, Any] | None
    heldout_after: dict[str, Any] | None
    stopped_by: int | None


def distill(config: DistillConfig) -> DistillResult:
    """Distils as `config` says. Under torchrun every process calls it.

    Raises:
        FileNotFoundError, ValueError, RuntimeError, ImportError: input that cannot work, see the message.
        OSError: the disk is full or cannot be written; what was saved before stays usable.
    """
    with Processes(config.device) as processes, StopSignals() as signals, _deterministic(processes.device):
        shares = processes.count * config.accumulation
        if config.batch_size % shares:
            raise ValueError(
                f"--batch-size {config.batch_size} must be divisible by processes x --accumulation "
                f"({processes.count} x {config.accumulation})"
            )
        with _output_folder(config, processes) as output:
            student = output / "student"
            if student.exists():
                if processes.main:
                    print(f"minilm-distill: {student} is finished already")
                return _result(config, output, config.steps, None)
            with closing(_Run(config, processes, output)) as run:
                step = run.train(signals)
                if step == config.steps:
                    processes.on_main(lambda: run.finish(student))
        stopped_by = signals.received if step < config.steps else None
        if processes.main:
            command = config.command(processes.count)
            resume = f"stopped at step {step}; continue with\n  {command} --resume"
            skipped = run.stream.bad_documents.summary()
            if skipped:
                print(f"minilm-distill: {skipped}")
            print(f"minilm-distill: {f'the student is in {student}' if stopped_by is None else resume}")
        return _result(config, output, step, stopped_by)


class _Run:
    """One process's part of a run."""

    def __init__(self, config: DistillConfig, processes: Processes, output: Path) -> None:
        self.config, self.processes = config, processes
        self.metrics_path = output / "metrics.jsonl"
        self.checkpoints = Checkpoints(output / "checkpoints", config.keep_checkpoints)
        sources, heldout_sources = _sources(config, _say if processes.main else _say_nothing)
        saved = self.checkpoints.newest() if config.resume else None
        if saved is not None and saved.numbers["processes"] != processes.count:
            _refuse(config, [f"processes: {saved.numbers['processes']} before, {processes.count} now"])

        self.pair: Pair = load_pair(config, processes.device)
        teacher, student = self.pair.teacher.model, self.pair.student.model
        processes.on_main(lambda: check_saving(student, self.pair.tokenizer, output))
        tokenizer = Tokenizer(self.pair.tokenizer)
        documents = (document for source in sources for document in source.read())
        check_text(tokenizer, (d.text for d in documents if d.text is not None), teacher, student)
        self.heldout: HeldOut | None = None
        if saved is None and (heldout_sources or config.heldout_fraction):
            separate = bool(heldout_sources)
            # Training names the bad documents of its text when it reaches them.
            say = _say if separate and processes.main else _say_nothing
            self.heldout = collect_heldout(
                heldout_sources or sources,
                separate=separate,
                fraction=config.heldout_fraction,
                packer=Packer(tokenizer, config.seq_len, config.packing),
                tokenizer=tokenizer,
                most=config.heldout_rows,
                bad_documents=BadDocuments(config.bad_documents, say),
            )
        self.stream = RowStream(
            sources,
            tokenizer,
            Packer(tokenizer, config.seq_len, config.packing),
            held_out=self.heldout,
            shuffle_rows=config.shuffle_rows,
            seed=config.seed,
            bad_documents=BadDocuments(config.bad_documents, lambda message: self.progress.say(message)),
        )

        self.names = list(self.pair.loss.relations)
        self.weights = torch.tensor(list(self.pair.loss.relations.values()), device=processes.device)
        self.parameters = self.pair.trained()
        # All gradients and, behind them, this step's losses are one buffer: one all-reduce, one norm, one scaling.
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.flat = torch.zeros(sum(sizes) + len(self.names), device=processes.device)
        self.gradients, self.losses = self.flat.split([sum(sizes), len(self.names)])
        for parameter, gradient in zip(self.parameters.values(), self.gradients.split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer = _optimizer(config, list(self.parameters.values()))

        self.step = 0
        self.tokens = 0
        self.window: list[Tensor] = []  # since the last line of metrics, a step each: relations, norm of the gradient
        torch.manual_seed(config.seed + processes.rank)
        if saved is not None:
            self._load(saved)
        self.progress = Progress(self.step, config.steps, processes.main)

    def close(self) -> None:
        self.progress.close()
        self.stream.close()

    def finish(self, target: Path) -> None:
        """Writes the result."""
        heldout = heldout_records(self.metrics_path)
        write_result(target, self.config, self.pair, self.metrics_path, heldout, self.processes.count)

    def train(self, signals: StopSignals) -> int:
        """Runs to the last step or to a signal; returns the steps done."""
        config, processes = self.config, self.processes
        processes.on_main(self._begin)
        if self.step:
            self.progress.say(f"continuing after step {self.step}")
        else:
            self._measure()
        self.pair.student.model.train()
        began, tokens = time.perf_counter(), self.tokens
        while self.step < config.steps:
            self._step()
            self.progress.advance()
            last = self.step == config.steps
            if self.step % config.log_every == 0 or last:
                record = self._window_record()
                rate = (self.tokens - tokens) / (time.perf_counter() - began)
                self._log("train", {**record, "tokens_per_second": round(rate, 1)})
                self.progress.train(self.step, record["loss"], rate)
                began, tokens = time.perf_counter(), self.tokens
            paused = time.perf_counter()
            if self.step % config.eval_every == 0 or last:
                self._measure()
            stop = processes.largest(signals.received)
            if self.step % config.checkpoint_every == 0 or last or stop:
                self._save()
            began += time.perf_counter() - paused
            if stop:
                signals.received = stop
                break
        return self.step

    def _begin(self) -> None:
        """From here on the folder holds a run."""
        write_file(self.metrics_path.with_name(SETTINGS), json.dumps(self.config.as_dict(), indent=1) + "\n")
        self.metrics = Metrics(self.metrics_path, self.step)

    def _step(self) -> None:
        """One optimizer step over `batch_size` rows; the weights of the parts make the average exact."""
        config, processes = self.config, self.processes
        rows = self.stream.take(config.batch_size)
        total = Counts.of(rows)
        share = config.batch_size // processes.count
        micro = share // config.accumulation
        self.flat.zero_()
        for start in range(processes.rank * share, (processes.rank + 1) * share, micro):
            part = slice(start, start + micro)
            batch = make_batch(config, rows, processes.device, (config.seed, 3, self.step), part)
            values = components(config, self.pair, batch, gradient=True)
            weight = Counts.of(rows.part(part)).weight(config.reduction, total)
            parts = weight * torch.stack([values[name] for name in self.names])
            torch.dot(parts, self.weights).backward()
            self.losses += parts.detach()
        processes.sum(self.flat)
        norm = torch.linalg.vector_norm(self.gradients)
        if config.clip:
            self.gradients.mul_((config.clip / (norm + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(self.step)
        self.optimizer.step()
        self.window.append(torch.cat([self.losses, norm[None]]))
        self.tokens += total.tokens
        self.step += 1

    def _window_record(self) -> dict[str, Any]:
        """Means over the steps since the last line; `grad_norm` is the last step's, before clipping."""
        *means, _ = self._finite_window().mean(0).tolist()
        values = dict(zip(self.names, means, strict=True))
        norm = float(self.window[-1][-1])
        self.window = []
        return {
            "epoch": self.stream.epoch,
            "tokens": self.tokens,
            "bad_documents": self.stream.bad_documents.bad,
            "null_documents": self.stream.bad_documents.nulls,
            "loss": sum(weight * values[name] for name, weight in self.pair.loss.relations.items()),
            **values,
            "lr": self.config.learning_rate(self.step - 1),
            "grad_norm": norm,
        }

    def _finite_window(self) -> Tensor:
        """(steps, relations + 1) float32 on the CPU. Raises `RuntimeError` if anything in it is not finite."""
        window = torch.stack(self.window).cpu() if self.window else torch.empty(0, len(self.names) + 1)
        if not window.isfinite().all():
            bad = self.step - len(window) + 1 + int((~window.isfinite()).any(1).nonzero()[0])
            raise RuntimeError(
                f"loss or gradient was not finite at step {bad}, and no checkpoint was written since; begin again in "
                "another --output with a lower --lr, a longer --warmup-steps or --precision float32"
            )
        return window

    def _measure(self) -> None:
        if self.heldout is not None:
            micro = self.config.batch_size // (self.processes.count * self.config.accumulation)
            measured = heldout_loss(self.config, self.pair, self.heldout.rows, micro, self.processes)
            self._log("heldout", {"tokens": self.tokens, **measured})
            self.progress.say(f"step {self.step}: held-out loss {measured['loss']:.4f}")

    def _log(self, split: str, record: dict[str, Any]) -> None:
        self.processes.on_main(lambda: self.metrics.write({"step": self.step, "split": split, **record}))

    def _save(self) -> None:
        numbers, data = self.stream.state()
        rng = {f"cpu.{rank}": state for rank, state in enumerate(self.processes.gather(torch.get_rng_state()))}
        if self.processes.device.type == "cuda":
            states = self.processes.gather(torch.cuda.get_rng_state(self.processes.device))
            rng |= {f"cuda.{rank}": state for rank, state in enumerate(states)}
        moments = {
            f"{name}.{key}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        checkpoint = Checkpoint(
            self.step,
            {"processes": self.processes.count, "tokens": self.tokens, "data": numbers},
            {
                "model": self.pair.student.model.state_dict(),
                "optimizer": moments,
                "data": data,
                "progress": {"window": self._finite_window(), **rng},
            },
        )

        def write() -> None:
            self.metrics.sync()
            self.checkpoints.write(checkpoint)

        self.processes.on_main(write)

    def _load(self, saved: Checkpoint) -> None:
        self.step, self.tokens = saved.step, saved.numbers["tokens"]
        self.pair.student.model.load_state_dict(saved.tensors["model"])
        state: dict[int, dict[str, Tensor]] = {}
        numbers = {
            id(value): i for i, value in enumerate(p for group in self.optimizer.param_groups for p in group["params"])
        }
        for key, tensor in saved.tensors["optimizer"].items():
            name, _, moment = key.rpartition(".")
            # A copy: the file's tensors are not aligned as torch's own, on which the last bits may depend.
            state.setdefault(numbers[id(self.parameters[name])], {})[moment] = tensor.clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.stream.load_state(saved.numbers["data"], saved.tensors["data"])
        self.heldout = self.stream.held_out
        progress = saved.tensors["progress"]
        self.window = list(progress["window"].to(self.processes.device))
        torch.set_rng_state(progress[f"cpu.{self.processes.rank}"])
        if self.processes.device.type == "cuda":
            torch.cuda.set_rng_state(progress[f"cuda.{self.processes.rank}"], self.processes.device)


def _say(message: str) -> None:
    print(f"minilm-distill: {message}", file=sys.stderr)


def _say_nothing(message: str) -> None:
    pass


def _sources(config: DistillConfig, say: Callable[[str], None]) -> tuple[list[Source], list[Source]]:
    """Training and separate held-out text; `say` is told what is left out of folders."""

    def files(paths: tuple[str, ...], option: str) -> list[Source]:
        by_line = config.documents == "line"
        return open_sources(paths, text_field=config.text_field, by_line=by_line, option=option, say=say)

    training: list[Source] = files(config.text, "--text")
    if config.dataset is not None:
        training = [HubDataset(config.dataset, config.dataset_config, config.dataset_split, config.text_field)]
    return training, files(config.heldout_text, "--heldout-text")


def _optimizer(config: DistillConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    """AdamW; biases and LayerNorms, the parameters of one dimension, do not decay."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = True if parameters[0].is_cuda else None
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _refuse(config: DistillConfig, differences: list[str]) -> None:
    if differences:
        listed = "\n  ".join(differences)
        raise ValueError(
            f"--resume: {config.output} holds a run with other settings; give those, or another --output:\n  {listed}"
        )


def _settings_of(output: Path) -> dict[str, Any]:
    """The settings of the run in a folder."""
    try:
        return json.loads((output / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--resume: {output} holds a run without readable {SETTINGS}; choose another folder"
        ) from error


@contextmanager
def _output_folder(config: DistillConfig, processes: Processes) -> Iterator[Path]:
    """The run's folder, held by this run alone and free of what a killed one left half written."""
    output = Path(config.output)
    lock = None

    def prepare() -> None:
        nonlocal lock
        if output.exists() and not output.is_dir():
            raise ValueError(f"--output: {output} is a file, expected a folder")
        taken = [name for name in (SETTINGS, "metrics.jsonl", "checkpoints", "student") if (output / name).exists()]
        if taken and not config.resume:
            raise ValueError(
                f"--output: {output} holds another run ({', '.join(taken)}); "
                "continue it with --resume, or choose another folder"
            )
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"--output: another process is running in {output}") from None
        if taken:
            _refuse(config, config.differences(_settings_of(output)))
        for folder in (output, output / "checkpoints"):
            remove_unfinished(folder)

    try:
        processes.on_main(prepare)
        yield output
    finally:
        if lock is not None:
            lock.close()


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA, algorithms that repeat bit for bit (attention's backward has others); those of the CPU do anyway."""
    if device.type != "cuda":
        yield
        return
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def _result(config: DistillConfig, output: Path, step: int, stopped_by: int | None) -> DistillResult:
    before, after = heldout_records(output / "metrics.jsonl") or (None, None)
    student = output / "student"
    return DistillResult(
        student if student.exists() else None, output / "metrics.jsonl", step, before, after, stopped_by
    )
