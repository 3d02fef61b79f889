"""The distillation loop: steps with the exact global average, held-out losses, checkpoints and resuming."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .bad_documents import BadDocuments
from .batch import Counts
from .checkpoint import (
    Checkpoint,
    Checkpoints,
    damaged,
    explained,
    make_folder,
    read_checkpoint,
    read_file,
    remove_unfinished,
    write_file,
)
from .conditions import broken_promises, conditions, teacher_digests
from .config import DistillConfig
from .console import forgiving_streams, say
from .data import HeldOut, Packer, Rows, RowStream, Tokenizer, collect_heldout
from .distributed import Processes
from .evaluation import components, heldout_loss, make_batch
from .metrics import Metrics, Progress, heldout_records, read_metrics
from .model_card import write_result
from .models import Pair, load_pair
from .preflight import check_saving, check_text
from .signals import StopSignals
from .sources import HubDataset, Source, open_sources

SETTINGS = "settings.json"
METRICS = "metrics.jsonl"
# What flock answers on file systems without locks; 524 is ENOTSUPP, which the kernel lets out of NFS.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, 524}


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
    with forgiving_streams(), Processes(config.device) as processes, _deterministic(processes.device):
        shares = processes.count * config.accumulation
        if config.batch_size % shares:
            raise ValueError(
                f"--batch-size {config.batch_size} must be divisible by processes x --accumulation "
                f"({processes.count} x {config.accumulation})"
            )
        with _output_folder(config, processes) as output:
            student = output / "student"
            if processes.on_main(lambda: _is_finished(student)):
                if processes.main:
                    print(f"minilm-distill: {student} is finished already")
                return processes.on_main(lambda: _result(output, config.steps, None))
            # Until here, and while the run is made ready, nothing would be lost: a signal ends the process at once.
            with closing(_Run(config, processes, output)) as run, StopSignals() as signals:
                run.train(signals)
                stopped_by = None if run.finished else signals.received
                if run.finished:
                    processes.on_main(lambda: run.finish(student))
            if processes.main:
                command = config.command(processes.count)
                resume = f"stopped at step {run.step}; continue with\n  {command} --resume"
                if skipped := run.stream.bad_documents.summary():
                    print(f"minilm-distill: {skipped}")
                print(f"minilm-distill: {f'the student is in {student}' if stopped_by is None else resume}")
            return processes.on_main(lambda: _result(output, run.step, stopped_by))


class _Run:
    """One process's part of a run."""

    def __init__(self, config: DistillConfig, processes: Processes, output: Path) -> None:
        self.config, self.processes = config, processes
        self.metrics_path = output / METRICS
        self.checkpoints = Checkpoints(output / "checkpoints", config.keep_checkpoints)
        saved = self._choose() if config.resume else None
        processes.together(lambda: self._prepare(saved))
        processes.agree(self.teacher, "the files of --teacher")
        self.progress = Progress(self.step, config.steps, processes.main)

    def _choose(self) -> Checkpoint | None:
        """The checkpoint that the main process finds to be the newest whole one, as every process reads it."""
        processes = self.processes
        found: Checkpoint | None = None

        def newest() -> str | None:
            nonlocal found
            found = self.checkpoints.newest()
            return None if found is None or found.folder is None else found.folder.name

        def read() -> Checkpoint | None:
            if name is None or found is not None:
                return found
            if not self.checkpoints.folder.is_dir():
                raise FileNotFoundError(
                    f"--output: there is no folder {self.checkpoints.folder} for this process; --output must lie on a "
                    "disk that all processes share"
                )
            return read_checkpoint(self.checkpoints.folder / name)

        name = processes.on_main(newest)
        saved = processes.together(read)
        processes.agree(saved and f"step {saved.step}, SHA-256 {saved.digest}", "the checkpoint to continue from")
        return saved

    def _prepare(self, saved: Checkpoint | None) -> None:
        """Makes all that the steps need. It does not communicate, so that a failure can be told to all."""
        config, processes = self.config, self.processes
        if saved is not None and saved.numbers.get("processes") != processes.count:
            _refuse(config, [f"processes: {saved.numbers.get('processes')} before, {processes.count} now"])
        tell = say if processes.main else _say_nothing
        sources, heldout_sources = _sources(config, tell)
        self.pair: Pair = load_pair(config, processes.device)
        teacher, student = self.pair.teacher.model, self.pair.student.model
        if processes.main:
            check_saving(student, self.pair.tokenizer, self.metrics_path.parent)
        tokenizer = Tokenizer(self.pair.tokenizer)
        documents = (document for source in sources for document in source.read())
        check_text(tokenizer, (d.text for d in documents if d.text is not None), teacher, student)
        self.heldout: HeldOut | None = None
        if saved is None and (heldout_sources or config.heldout_fraction):
            separate = bool(heldout_sources)
            # Training names the bad documents of its text when it reaches them.
            self.heldout = collect_heldout(
                heldout_sources or sources,
                separate=separate,
                fraction=config.heldout_fraction,
                packer=Packer(tokenizer, config.seq_len, config.packing),
                tokenizer=tokenizer,
                most=config.heldout_rows,
                bad_documents=BadDocuments(config.bad_documents, tell if separate else _say_nothing),
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

        # One process a machine reads the files again: machines may have different ones.
        self.teacher = teacher_digests(self.pair) if processes.local_rank == 0 or processes.main else None
        self.conditions = conditions(processes.device)

        self.step = 0
        self.unmeasured = True  # the held-out loss of this step
        self.saved_step = 0
        self.tokens = 0
        self.window: list[Tensor] = []  # since the last line of metrics, a step each: relations, norm of the gradient
        torch.manual_seed(config.seed + processes.rank)
        if saved is not None:
            try:
                self._load(saved)
            except torch.OutOfMemoryError:
                raise
            except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RuntimeError) as error:
                raise damaged(saved.folder, error) from error

    @property
    def finished(self) -> bool:
        """Whether only the result is to be written."""
        return self.step == self.config.steps and not self.unmeasured

    def close(self) -> None:
        self.progress.close()
        self.stream.close()

    def finish(self, target: Path) -> None:
        """Writes the result."""
        heldout = heldout_records(self.metrics_path)
        write_result(target, self.config, self.pair, self.metrics_path, heldout, self.processes.count)

    def train(self, signals: StopSignals) -> None:
        """Runs to the last step or to a signal, which is then `signals.received` on every process."""
        config, processes = self.config, self.processes
        processes.on_main(self._begin)
        if self.step:
            self.progress.say(f"continuing after step {self.step}")
        self.pair.student.model.train()
        if self.unmeasured:
            self._measure(signals)
        stop = processes.largest(signals.received)
        began, tokens = time.perf_counter(), self.tokens
        while self.step < config.steps and not stop:
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
                self._measure(signals)
            stop = processes.largest(signals.received)
            if self.step % config.checkpoint_every == 0 or last or stop:
                self._save()
            began += time.perf_counter() - paused
        signals.received = stop

    def _begin(self) -> None:
        """From here on the folder holds a run."""
        if self.config.resume and not self.step and (records := read_metrics(self.metrics_path)):
            say(
                f"there is no checkpoint in {self.checkpoints.folder}: beginning again, without the {len(records)} "
                f"lines of {self.metrics_path}"
            )
        settings = json.dumps(self.config.as_dict(), indent=1) + "\n"
        write_file(self.metrics_path.with_name(SETTINGS), settings.encode())
        self.metrics = Metrics(self.metrics_path, self.step, measured=not self.unmeasured)
        self.checkpoints.rotate()

    def _rows(self) -> Rows:
        """The rows of the next step. Where they cannot be had, the steps since the last checkpoint are saved first."""
        rows: Rows | None = None

        def take() -> None:
            nonlocal rows
            rows = self.stream.take(self.config.batch_size)

        try:
            self.processes.together(take)
        except Exception:
            if rows is not None:  # another process failed
                self.stream.put_back(rows)
            if self.step > self.saved_step:
                try:
                    self._save()
                    self.progress.say(f"saved step {self.step} before the error")
                except (OSError, RuntimeError) as error:
                    self.progress.say(f"step {self.step} could not be saved: {error}")
            raise
        assert rows is not None
        return rows

    def _step(self) -> None:
        """One optimizer step over `batch_size` rows; the weights of the parts make the average exact."""
        config, processes = self.config, self.processes
        rows = self._rows()
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

    def _measure(self, signals: StopSignals) -> None:
        """Logs the held-out loss; one that a signal cuts short is measured when the run continues."""
        measured: dict[str, float] | None = None
        if self.heldout is not None:
            micro = self.config.batch_size // (self.processes.count * self.config.accumulation)
            rows = self.heldout.rows
            measured = heldout_loss(self.config, self.pair, rows, micro, self.processes, lambda: signals.received)
            if measured is not None:
                self._log("heldout", {"tokens": self.tokens, **measured})
                self.progress.say(f"step {self.step}: held-out loss {measured['loss']:.4f}")
        self.unmeasured = self.heldout is not None and measured is None

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
            {
                "settings": self.config.as_dict(),
                "processes": self.processes.count,
                "tokens": self.tokens,
                "unmeasured": self.unmeasured,
                "teacher": self.teacher,
                "conditions": self.conditions,
                "data": numbers,
            },
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
        self.saved_step = self.step

    def _load(self, saved: Checkpoint) -> None:
        _refuse(self.config, self.config.differences(saved.numbers["settings"]))  # the folder may be of another run
        before = saved.numbers["teacher"]
        if self.teacher is not None and before != self.teacher:
            changed = sorted(file for file in {*before, *self.teacher} if before.get(file) != self.teacher.get(file))
            raise ValueError(
                f"--resume: --teacher {self.config.teacher} has changed since the checkpoint ({', '.join(changed)}); "
                "give the teacher as it was, or begin again in another --output"
            )
        if self.processes.main:
            for line in broken_promises(saved.numbers["conditions"], self.conditions):
                say(line)
        self._check(saved)
        self.step = self.saved_step = saved.step
        self.tokens = saved.numbers["tokens"]
        self.unmeasured = saved.numbers["unmeasured"]
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
        if self.processes.device.type == "cuda" and f"cuda.{self.processes.rank}" in progress:  # else: it ran on a CPU
            torch.cuda.set_rng_state(progress[f"cuda.{self.processes.rank}"], self.processes.device)

    def _check(self, saved: Checkpoint) -> None:
        """Raises `ValueError` if the checkpoint is not one of this run, or not of a step of it."""
        config = self.config

        def expect(right: bool, what: str) -> None:
            if not right:
                raise damaged(saved.folder, ValueError(what))

        expect(0 < saved.step <= config.steps, f"step {saved.step} is not among the {config.steps} of --steps")
        for name, kind in (("tokens", int), ("unmeasured", bool), ("data", dict)):
            value = saved.numbers[name]
            expect(type(value) is kind, f"{name} is {value!r}")
        moments = {
            f"{name}.{moment}": shape
            for name, parameter in self.parameters.items()
            for moment, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape))
        }
        found = {name: tensor.shape for name, tensor in saved.tensors["optimizer"].items()}
        expect(found == moments, "the optimizer's state does not fit the student")
        window = saved.tensors["progress"]["window"]
        expect(window.dim() == 2 and window.shape[1] == len(self.names) + 1, f"window is {tuple(window.shape)}")
        words = self.pair.student.model.get_input_embeddings().weight.shape[0]
        data = saved.tensors["data"]
        row = (config.seq_len,)
        widths = {"buffer": row, "drawn": row, "open": ()} | ({"heldout": row} if "heldout.ids" in data else {})
        for part, width in widths.items():
            ids, positions = data[f"{part}.ids"], data[f"{part}.positions"]
            expect(
                ids.shape == positions.shape
                and ids.shape[1:] == width
                and ids.dtype == positions.dtype == torch.int32
                and (not ids.numel() or bool(ids.min() >= 0 and ids.max() < words)),
                f"{part} is no text of this tokenizer",
            )


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
        settings = json.loads(read_file(output / SETTINGS))
        if not isinstance(settings, dict):
            raise TypeError(f"expected an object, got {type(settings).__name__}")
        return settings
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"--resume: {output} holds a run without readable {SETTINGS} ({error}); choose another folder"
        ) from error


def _is_finished(student: Path) -> bool:
    """Whether a student is there. Raises `ValueError` for anything else of that name that a student cannot replace."""
    if (student / "config.json").is_file() and any(student.glob("*.safetensors")):
        return True
    if os.path.lexists(student) and not _is_empty_folder(student):
        raise ValueError(
            f"--output: {student} is neither a finished student nor an empty folder; move it away, the student is to "
            "be written there"
        )
    return False


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _hold(output: Path) -> BinaryIO:
    """The run's lock, as an open file that names host and process. Raises `RuntimeError` if another one holds it."""
    path = output / ".lock"
    if path.is_symlink():
        raise ValueError(f"--output: {path} is a symbolic link; remove it")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    lock = open(handle, "r+b", buffering=0)  # noqa: PTH123, SIM115
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(f"--output: {path} is not a regular file; remove it")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = lock.read(200).decode("utf-8", "replace").strip()
            raise RuntimeError(
                f"--output: another process is running in {output}" + (f" ({holder})" if holder else "")
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, f"--output: {path} cannot be locked: {error.strerror}") from error
            say(f"--output: {output} has no file locks ({error.strerror}); see to it that one process runs in it")
        with suppress(OSError):  # only a help for people
            lock.truncate(0)
            lock.write(f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
    except BaseException:
        lock.close()
        raise
    return lock


@contextmanager
def _output_folder(config: DistillConfig, processes: Processes) -> Iterator[Path]:
    """The run's folder, held by this run alone and free of what a killed one left half written."""
    output = Path(config.output)
    lock: BinaryIO | None = None

    def taken() -> bool:
        names = (SETTINGS, METRICS, "checkpoints", "student")
        found = [name for name in names if os.path.lexists(output / name) and not _is_empty_folder(output / name)]
        if found and not config.resume:
            raise ValueError(
                f"--output: {output} holds another run ({', '.join(found)}); "
                "continue it with --resume, or choose another folder"
            )
        return bool(found)

    def prepare() -> None:
        nonlocal lock
        if output.exists() and not output.is_dir():
            raise ValueError(f"--output: {output} is a file, expected a folder")
        taken()  # before anything is written into a folder that is not ours
        try:
            make_folder(output)
            lock = _hold(output)
        except OSError as error:
            raise explained(error, output) from error
        if taken():  # by a run that has just ended, too
            _refuse(config, config.differences(_settings_of(output)))
        checkpoints = output / "checkpoints"
        if os.path.lexists(checkpoints) and not checkpoints.is_dir():
            raise ValueError(
                f"--output: {checkpoints} is no folder; move it away, the checkpoints are to be written there"
            )
        for folder in (output, checkpoints):
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


def _result(output: Path, step: int, stopped_by: int | None) -> DistillResult:
    before, after = heldout_records(output / METRICS) or (None, None)
    student = output / "student" if stopped_by is None else None
    return DistillResult(student, output / METRICS, step, before, after, stopped_by)
