"""`distill`: the training loop, with evaluation, checkpoints and resuming."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from . import hub
from .bad_documents import BadDocuments
from .checkpoint import TEMPORARY, Checkpoint, Checkpoints, read_checkpoint
from .conditions import conditions, teacher_digests
from .config import DistillConfig
from .console import forgiving_streams, say
from .distributed import DistContext
from .eval_set import EvalSet, collect_eval_set, split_eval_set
from .evaluation import evaluate
from .gradients import SummedGradients
from .memory import is_out_of_memory
from .metrics import Metrics, Progress, eval_records, read_metrics
from .model_card import write_student
from .models import TeacherStudent, load_models
from .optimizer import learning_rate_at, make_optimizer
from .packing import Packer
from .prefetch import Prefetcher, PreparedStep
from .preflight import check_masks, check_saving, check_text
from .preparation import document_texts, open_text, prepare_text
from .recipes import recipe_summary
from .run_folder import (
    CHECKPOINTS,
    METRICS,
    STUDENT,
    is_finished,
    output_folder,
    write_settings,
)
from .run_state import RunState
from .sample_stream import SampleStream
from .sharding import ShardedGradients, shard_student
from .signals import StopSignals
from .sources import Source
from .stages import Stage, stages
from .step import loss_vector, seed_dropout, teacher_qkv
from .teacher_cache import TeacherCache
from .token_shards import TokenShards
from .tokenization import CHECKED_DOCUMENTS, DocumentTokenizer
from .trackers import Trackers

T = TypeVar("T")


@dataclass(frozen=True)
class DistillResult:
    """The result of a run.

    Attributes:
        student: folder of the finished student, for `AutoModel` and `AutoTokenizer`; `None` if the run was stopped.
        metrics: metrics.jsonl, one JSON object per line. Lines with `split` "train" have `step`, `loss`, the loss of
            each relation, `learning_rate`, `grad_norm` and others; lines with `split` "eval" have `eval_loss` and the
            loss of each relation as `eval_qq` and so on. With teacher assistants, every stage has a file, and this is
            that of the latest one.
        step: number of finished optimizer steps of this stage.
        eval_before, eval_after: the first eval record, and that of the student; `None` without evaluation.
        stopped_by: number of the signal that stopped the run; `None` if it is finished.

    Example:
        >>> from pathlib import Path
        >>> from minilm_kernels.distill import DistillResult
        >>> before, after = {"eval_loss": 1.8}, {"eval_loss": 0.3}
        >>> result = DistillResult(Path("run/student"), Path("run/metrics.jsonl"), 300, before, after, None)
        >>> result.student.name, result.eval_after["eval_loss"]
        ('student', 0.3)
    """

    student: Path | None
    metrics: Path
    step: int
    eval_before: dict[str, Any] | None
    eval_after: dict[str, Any] | None
    stopped_by: int | None


def distill(config: DistillConfig) -> DistillResult:
    """Distills a teacher into a student.

    The run writes checkpoints, metrics.jsonl and the finished student to `config.output_dir`. SIGINT, SIGTERM and other
    stop signals end it after the current step with a checkpoint; the same call with `resume_from_checkpoint=True`
    continues it with the same results, to the last bit on the same machine. Under torchrun, every process calls this
    function.

    Args:
        config: the settings.

    Returns:
        The folder of the student, and the evaluation losses before and after training.

    Raises:
        FileNotFoundError, ValueError: a model, a text or a setting cannot be used. The message names the option.
        RuntimeError: a loss is not finite, another process uses the folder, or a device is missing.
        ImportError: an optional dependency is missing. The message names the extra to install.
        OSError: the disk is full or cannot be written. Earlier checkpoints remain usable.

    Example:
        A tiny teacher with random weights, distilled for two steps:

        >>> import tempfile
        >>> from pathlib import Path
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
        >>> from minilm_kernels.distill import DistillConfig, distill
        >>> folder = Path(tempfile.mkdtemp())
        >>> words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c", "d"])}
        >>> tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
        >>> _ = tokenizer.save_pretrained(folder / "teacher")
        >>> sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
        >>> BertModel(BertConfig(vocab_size=6, **sizes)).save_pretrained(folder / "teacher")
        >>> _ = (folder / "text.txt").write_text("\\n\\n".join(f"a b c d {w}" for w in "abcd" * 10))
        >>> config = DistillConfig(
        ...     teacher=folder / "teacher", copy_layers=(2,), text=[folder / "text.txt"], output_dir=folder / "run",
        ...     relation_heads=4, max_seq_length=16, total_batch_size=2, max_steps=2, device="cpu",
        ... )
        >>> result = distill(config)  # doctest: +ELLIPSIS
        minilm-distill: the student is in ...
        >>> result.step, result.student.name, result.eval_before["split"]
        (2, 'student', 'eval')
    """
    with (
        forgiving_streams(),
        DistContext(config.device) as dist,
        _deterministic(dist.device),
        ExitStack() as folders,
    ):
        chain = stages(config)
        for stage in chain:
            _check_batch_size(stage.config, dist.world_size)
        if config.recipe is not None and dist.is_main:
            say(recipe_summary(config))
        for stage in reversed(chain):  # the folder of the run first
            folders.enter_context(output_folder(stage.config, dist))
        output = chain[-1].folder
        if config.push_to_hub:
            dist.on_main(lambda: hub.prepare(config))
        if dist.on_main(lambda: is_finished(output / STUDENT)):
            if dist.is_main:
                print(f"minilm-distill: {output / STUDENT} is already finished")
            result = dist.on_main(lambda: _result(config, output, config.max_steps, None))
            chain = []
        for number, stage in enumerate(chain, 1):
            if not dist.on_main(partial(is_finished, stage.folder / STUDENT)):
                result = _run_stage(stage, chain[number:], dist)
                if result.stopped_by is not None:
                    if dist.is_main:
                        at = f"step {result.step} of {stage.name}" if stage.name else f"step {result.step}"
                        command = config.command(dist.world_size)
                        print(f"minilm-distill: stopped at {at}; continue with\n  {command} --resume-from-checkpoint")
                    break
        if config.push_to_hub and result.student is not None:
            dist.on_main(lambda: hub.push(config, output / STUDENT))
        return result


def _run_stage(stage: Stage, later: Sequence[Stage], dist: DistContext) -> DistillResult:
    """Trains the model of a stage and writes it, or stops at a signal."""
    output = stage.folder
    with closing(TrainingLoop(stage, dist, later)) as loop:

        def begin() -> None:
            for each in (stage, *later):  # from here on, their folders contain a run
                write_settings(each.config)

        dist.on_main(begin)
        # Signals are caught from the first step on. Before that they end the process, and no work is lost.
        with StopSignals() as signals:
            loop.train(signals)
            if loop.finished:
                weights = loop.state.weights()
                dist.on_main(lambda: loop.write_student(output / STUDENT, weights))
            # A signal during the last step of a stage comes before the next one.
            stopped_by = None if loop.finished and not later else dist.max(signals.received) or None
        if dist.is_main:
            if skipped := loop.stream.shards.counts.bad:
                print(f"minilm-distill: skipped bad documents: {skipped}")
            if loop.finished:
                print(f"minilm-distill: {'the student' if not later else stage.name} is in {output / STUDENT}")
        return dist.on_main(lambda: _result(stage.config, output, loop.state.step, stopped_by))


def _check_batch_size(config: DistillConfig, processes: int) -> None:
    shares = processes * config.gradient_accumulation_steps
    if config.total_batch_size % shares:
        raise ValueError(
            f"--total-batch-size {config.total_batch_size} must be divisible by processes x "
            f"--gradient-accumulation-steps ({processes} x {config.gradient_accumulation_steps})"
        )


class TrainingLoop:
    """The part of a stage that one process executes.

    Args:
        stage: the stage. Its folder is locked.
        dist: rank, device and collectives.
        later: later stages, whose models are checked.

    Attributes:
        models: the teacher of this stage, and its student.
        state: everything that checkpoints contain.
        stream: the training samples.
    """

    def __init__(self, stage: Stage, dist: DistContext, later: Sequence[Stage] = ()) -> None:
        self.stage, self.dist = stage, dist
        self.config = config = stage.config
        self.metrics_path = stage.folder / METRICS
        self.checkpoints = Checkpoints(stage.folder / CHECKPOINTS, config.save_total_limit)
        self.trackers: Trackers | None = None
        saved = self._choose_checkpoint() if config.resume_from_checkpoint else None
        dist.on_all(lambda: self._load_models(saved, later))
        self._prepare_text(resumed=saved is not None)
        dist.on_all(lambda: self._prepare(saved))
        dist.check_equal(self.state.teacher_digests, "the files of --teacher")
        if (vocabulary := self.models.vocabulary) is not None:
            kept = hashlib.sha256(vocabulary.teacher_ids.numpy().tobytes()).hexdigest()
            dist.check_equal(kept, "the tokens that --trim-vocabulary keeps")
        self.cache = self.steps.cache = self._open_cache() if config.cache_teacher is not None else None
        self.progress = Progress(
            self.state.step,
            config.max_steps,
            dist.is_main,
            stage=stage.name,
            before=stage.steps_before,
            after=stage.steps_after,
        )

    def _choose_checkpoint(self) -> Checkpoint | None:
        """Restores the newest complete checkpoint. The main process selects it, and every process reads it."""
        dist = self.dist
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
                    f"--output-dir: this process has no folder {self.checkpoints.folder}; --output-dir must be on a "
                    "disk that all processes share"
                )
            return read_checkpoint(self.checkpoints.folder / name)

        name = dist.on_main(newest)
        saved = dist.on_all(read)
        dist.check_equal(saved and f"step {saved.step}, SHA-256 {saved.digest}", "the checkpoint to continue from")
        return saved

    def _load_models(self, saved: Checkpoint | None, later: Sequence[Stage]) -> None:
        """Loads and checks the models, and opens the text. This method does not communicate, as `_prepare`."""
        config, dist = self.config, self.dist
        tell = say if dist.is_main else _ignore
        self._sources, self._eval_sources = open_text(config, tell)
        teacher_ids = None if saved is None else saved.tensors["progress"].get("vocabulary")
        output = self.stage.folder if dist.is_main else None
        models, tokenizer = _checked_models(self.stage.model_config(), dist.device, self._sources, output, teacher_ids)
        tell(models.attention)
        if models.vocabulary is not None:
            tell(f"--trim-vocabulary: {models.vocabulary.summary(models.tokenizer)}")
        self.models: TeacherStudent = models
        self.tokenizer = tokenizer
        if dist.is_main:
            _check_later_stages(later, self)

    def _prepare_text(self, *, resumed: bool) -> None:
        """Tokenizes the text on the main process, in rounds, so that the others do not wait too long at a time."""
        config, dist, folder = self.config, self.dist, self.stage.tokens
        if config.tokens is not None:
            return

        def differs(difference: str) -> None:
            if resumed:
                raise ValueError(
                    f"--resume-from-checkpoint: the training text has changed since it was tokenized ({difference}); "
                    "restore it, or start again in another --output-dir"
                )
            say(f"{folder} has the tokens of another text, or of another tokenizer ({difference}): making them anew")

        with closing(
            prepare_text(
                config, folder, self._sources, self.tokenizer, BadDocuments(config.bad_documents, say), differs
            )
        ) as rounds:
            while not dist.on_main(lambda: next(rounds)):
                pass

    def _prepare(self, saved: Checkpoint | None) -> None:
        """Creates everything that the steps need.

        This method does not communicate, so that a failure on one process can be reported to all.
        """
        config, dist, models, tokenizer = self.config, self.dist, self.models, self.tokenizer
        shards = TokenShards(self.stage.tokens)
        if shards.plan["tokenizer"] != tokenizer.digest():
            raise ValueError(
                f"--tokens: {shards.folder} has the tokens of another tokenizer than that of --teacher; prepare them "
                "with this teacher"
            )
        if dist.is_main:
            shards.verify()
        eval_set: EvalSet | None = None
        if saved is None and self._eval_sources:
            eval_set = collect_eval_set(
                self._eval_sources,
                self._packer(),
                tokenizer,
                config.eval_samples,
                BadDocuments(config.bad_documents, say if dist.is_main else _ignore),
            )
        elif saved is None and config.eval_fraction:
            eval_set = split_eval_set(shards, config.eval_fraction, self._packer(), config.eval_samples)
        self.stream = SampleStream(shards, self._packer(), eval_set=eval_set, seed=config.seed)
        if config.torch_compile:
            models.compile()
        self.steps = Prefetcher(config, self.stream, models.mask, dist)
        self.weights = torch.tensor(list(models.loss.relations.values()), device=dist.device)  # (relations,)
        sent = getattr(torch, config.gradient_dtype)
        self.sharded = config.parallel == "fsdp" and dist.world_size > 1
        if self.sharded:
            shard_student(models, dist, sent)
        parameters = models.trained()
        self.gradients: SummedGradients | ShardedGradients
        if self.sharded:
            self.gradients = ShardedGradients(parameters.values(), len(self.weights), dist)
        else:
            self.gradients = SummedGradients(parameters.values(), len(self.weights), dist, sent)
        self.state = RunState(
            config,
            dist,
            models,
            self.steps,
            make_optimizer(config, list(parameters.values())),
            parameters,
            # One process per machine reads the files again, because each machine may have other files.
            teacher_digests(models) if dist.local_rank == 0 or dist.is_main else None,
            conditions(dist.device),
        )
        if saved is not None:
            self.state.load(saved)
        self.saved_step = self.state.step

    def _open_cache(self) -> TeacherCache:
        """Opens the cache of the teacher's values, and checks that it has room for those of all samples."""
        config, dist, models = self.config, self.dist, self.models
        assert config.cache_teacher is not None
        folder = Path(config.cache_teacher)
        key = {
            "teacher": dist.on_main(lambda: self.state.teacher_digests),
            "layer": models.teacher.extractor.layer,
            "projections": config.teacher_projections,
            "computed in": "bfloat16 autocast" if config.bf16 else config.teacher_dtype,
            "mask": models.mask,
            "prefixes": [*config.prefix_range, config.total_batch_size] if models.mask == "prefix" else None,
            "packing": config.packing,
            "max_document_length": models.max_document_length,
            "seed": config.seed,
            "text": self.stream.shards.digest,
            "eval": self.stream.state()[0]["eval_set"],  # these documents are left out
        }
        cache = dist.on_all(
            lambda: TeacherCache(
                folder,
                key,
                models.teacher.widths,
                config.max_seq_length,
                packed=config.packing,
                dtype=getattr(torch, config.cache_teacher_dtype),
                pinned=dist.device.type == "cuda",
            )
        )
        dist.on_main(lambda: say(f"--cache-teacher: {cache.check_room(config.max_steps * config.total_batch_size)}"))
        return cache

    def _packer(self) -> Packer:
        config = self.config
        return Packer(self.tokenizer, config.max_seq_length, config.packing, self.models.max_document_length)

    @property
    def finished(self) -> bool:
        """True if only the student remains to be written."""
        return self.state.step == self.config.max_steps and not self.state.eval_pending

    def close(self) -> None:
        """Ends the trackers, the progress bar and the threads."""
        if self.trackers is not None:
            self.trackers.close()
        self.progress.close()
        self.steps.close()
        if self.cache is not None:
            self.cache.close()

    def write_student(self, target: Path, weights: dict[str, torch.Tensor]) -> None:
        """Writes the finished student with the weights of the last step, or the best ones if they are asked for."""
        step, best = self.state.step, self.state.best_step
        if best is not None and best != step:
            try:
                weights = self.checkpoints.weights(best)
                step = best
            except (OSError, ValueError) as error:
                say(f"--load-best-model-at-end: {error}; the student gets the weights of the last step")
        evaluations = eval_records(self.metrics_path, best=step == best)
        processes = self.dist.world_size
        write_student(target, self.config, self.models, weights, self.metrics_path, evaluations, processes, step)

    def train(self, signals: StopSignals) -> None:
        """Trains until the last step or a stop signal of any process."""
        config, dist, state = self.config, self.dist, self.state
        dist.on_main(self._begin)
        if state.step:
            self.progress.say(f"continuing after step {state.step}")
        self.models.student.extractor.train()
        if state.eval_pending:
            self._evaluate(signals)
        stop = dist.max(signals.received)
        began, tokens = time.perf_counter(), state.tokens
        while state.step < config.max_steps and not stop:
            self._step()
            self.progress.advance()
            last = state.step == config.max_steps
            if state.step % config.logging_steps == 0 or last:
                record = self._train_record()
                rate = (state.tokens - tokens) / (time.perf_counter() - began)
                self._log("train", {**record, "tokens_per_second": round(rate, 1)})
                self.progress.train(state.step, record["loss"], rate)
                began, tokens = time.perf_counter(), state.tokens
            paused = time.perf_counter()
            improved = (state.step % config.eval_steps == 0 or last) and self._evaluate(signals)
            stop = dist.max(signals.received)
            if state.step % config.save_steps == 0 or last or stop or improved:
                self._save()
            began += time.perf_counter() - paused

    def _begin(self) -> None:
        """Begins or continues metrics.jsonl, and removes old checkpoints."""
        if self.config.resume_from_checkpoint and not self.state.step and (records := read_metrics(self.metrics_path)):
            say(
                f"there is no checkpoint in {self.checkpoints.folder}: starting from the beginning and removing the "
                f"{len(records)} lines of {self.metrics_path}"
            )
        self.metrics = Metrics(self.metrics_path, self.state.step, evaluated=not self.state.eval_pending)
        self.checkpoints.rotate(self.state.best_step)
        self.trackers = Trackers(self.stage.folder, self.config, self.state.step)

    def _prepared(self) -> PreparedStep:
        """The data of the next step. If it cannot be read, the steps since the last checkpoint are saved first."""
        state = self.state
        try:
            self.dist.on_all(lambda: self.steps.wait(state.step, state.micro_batch))
        except Exception:
            if state.step > self.saved_step:
                try:
                    self._save()
                    self.progress.say(f"saved step {state.step} before the error")
                except (OSError, RuntimeError) as error:
                    self.progress.say(f"step {state.step} could not be saved: {error}")
            raise
        return self.steps.pop()

    def _step(self) -> None:
        """Runs an optimizer step. The gradient is the exact mean over all samples of the step."""
        config, state = self.config, self.state
        prepared = self._prepared()
        self._within_memory(lambda micro: self._accumulate(prepared, micro))
        norm = self.gradients.clip_(config.max_grad_norm)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate_at(config, state.step)
        state.optimizer.step()
        state.window.append(torch.cat([self.gradients.losses, norm[None]]))
        state.tokens += prepared.total.tokens
        state.step += 1

    def _accumulate(self, prepared: PreparedStep, micro: int) -> None:
        """Computes the gradient of the step. Each process computes its part, `micro` samples at a time."""
        config = self.config
        with self.gradients.summed():
            parts = self.steps.micro_batches(prepared, micro)
            for part in parts:
                batch = part.batch.to(self.dist.device)
                if self.cache is not None and batch.teacher is None:
                    teacher = teacher_qkv(self.models, batch, bf16=config.bf16)
                    batch.teacher = self.cache.store(part.first, part.samples, teacher)
                seed_dropout(config.seed, self.state.step, part.start)
                losses = part.weight * loss_vector(config, self.models, batch, requires_grad=True)
                if part is parts[-1]:
                    self.gradients.exchange_in_next_backward()
                torch.dot(losses, self.weights).backward()
                self.gradients.losses += losses.detach()

    def _within_memory(self, action: Callable[[int], T]) -> T:
        """Calls `action` with the size of a micro-batch. If memory runs out on any process, all halve it and repeat.

        `action` communicates as often if it fails as if it succeeds. With `--parallel fsdp` it cannot be repeated.
        """
        dist, state = self.dist, self.state
        while True:
            problem, result = "", None
            try:
                result = action(state.micro_batch)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not is_out_of_memory(error):
                    raise
                if self.sharded:
                    raise RuntimeError(
                        f"out of memory: --parallel fsdp cannot repeat a step; continue with --resume-from-checkpoint "
                        f"and a --micro-batch-size below {state.micro_batch} ({error})"
                    ) from error
                problem = str(error)  # the error itself would keep the tensors of its traceback
            if not dist.max(int(bool(problem))):
                return cast(T, result)
            if state.micro_batch == 1:
                raise RuntimeError(
                    "out of memory with a micro-batch of one sample; use --gradient-checkpointing, --teacher-dtype "
                    f"bfloat16, --bf16, or a shorter --max-seq-length ({problem or 'on another process'})"
                )
            state.micro_batch = (state.micro_batch + 1) // 2
            result = None
            if dist.device.type == "cuda":
                torch.cuda.empty_cache()
            self.progress.say(f"out of memory: continuing with micro-batches of {state.micro_batch} samples")

    def _train_record(self) -> dict[str, Any]:
        """Mean losses since the last line of metrics, and the norm of the last gradient before clipping."""
        state, relations = self.state, self.models.loss.relations
        *means, _ = state.finite_window().mean(0).tolist()
        values = dict(zip(relations, means, strict=True))
        norm = float(state.window[-1][-1])
        state.window = []
        return {
            "epoch": self.steps.epoch,
            "tokens": state.tokens,
            "bad_documents": self.stream.shards.counts.bad,
            "null_documents": self.stream.shards.counts.nulls,
            "loss": sum(weight * values[name] for name, weight in relations.items()),
            **values,
            "learning_rate": learning_rate_at(self.config, state.step - 1),
            "grad_norm": norm,
        }

    def _evaluate(self, signals: StopSignals) -> bool:
        """Evaluates the student. If a signal interrupts the evaluation, the resumed run repeats it.

        Returns True if a checkpoint must be written, because `--load-best-model-at-end` may need these weights.
        """
        state, eval_set = self.state, self.stream.eval_set
        measured: dict[str, float] | None = None
        if eval_set is not None:
            measured = evaluate(
                self.config,
                self.models,
                eval_set.samples,
                self.dist,
                (lambda: 0) if self.sharded else (lambda: signals.received),  # all evaluate equally many micro-batches
                self._within_memory,
            )
            if measured is not None:
                self._log("eval", {"tokens": state.tokens, **measured})
                self.progress.say(f"step {state.step}: eval_loss {measured['eval_loss']:.4f}")
        state.eval_pending = eval_set is not None and measured is None
        if measured is None or not (self.config.load_best_model_at_end and state.step):
            return False
        if state.best_loss is not None and measured["eval_loss"] >= state.best_loss:
            return False
        state.best_step, state.best_loss = state.step, measured["eval_loss"]
        return True

    def _log(self, split: str, record: dict[str, Any]) -> None:
        stage = {"stage": self.stage.name} if self.stage.name else {}
        step = self.state.step

        def write() -> None:
            self.metrics.write({"step": step, "split": split, **stage, **record})
            assert self.trackers is not None
            self.trackers.log(step, split, record)

        self.dist.on_main(write)

    def _save(self) -> None:
        checkpoint = self.state.checkpoint()

        def write() -> None:
            self.metrics.sync()
            self.checkpoints.write(checkpoint, self._write_loadable, self.state.best_step)

        self.dist.on_main(write)
        self.saved_step = self.state.step

    def _write_loadable(self, folder: Path) -> None:
        """Writes what `from_pretrained` needs beside the weights, so that every checkpoint is a student."""
        self.models.student.model.config.save_pretrained(folder)
        self.models.student_tokenizer.save_pretrained(folder)


def _ignore(message: str) -> None:
    pass


def _checked_models(
    config: DistillConfig,
    device: torch.device,
    sources: Sequence[Source],
    output: Path | None,
    teacher_ids: torch.Tensor | None = None,
) -> tuple[TeacherStudent, DocumentTokenizer]:
    """Loads the models, and checks them, their tokenizer and the text.

    Args:
        output: folder in which saving the student is tried; `None` to leave this out.
        teacher_ids: the student's vocabulary of a run that is resumed.
    """
    models = load_models(config, device, _counted(config, sources), teacher_ids)
    if output is not None:
        check_saving(models.student.model, models.student_tokenizer, output)
    tokenizer = DocumentTokenizer(models.tokenizer)
    student = models.student.model if models.vocabulary is None else None
    check_text(tokenizer, document_texts(sources), models.teacher.model, student)
    check_masks(models, tokenizer, config.max_seq_length, config.packing)
    return models, tokenizer


def _check_later_stages(later: Sequence[Stage], loop: TrainingLoop) -> None:
    """Checks the models of later stages before the first step, with untrained assistants as their teachers."""
    models, device = loop.models, loop.dist.device
    for stage in later:
        with tempfile.TemporaryDirectory(
            prefix=f"{TEMPORARY}{stage.name}-", dir=loop.stage.folder, ignore_cleanup_errors=True
        ) as folder:
            models.student.model.save_pretrained(folder)
            models.student_tokenizer.save_pretrained(folder)
            config = replace(stage.model_config(Path(folder)), trim_vocabulary_documents=CHECKED_DOCUMENTS)
            try:
                models, _ = _checked_models(config, device, open_text(config, _ignore)[0], stage.folder)
            except ValueError as error:
                raise ValueError(f"{stage.name}: {error}") from error


def _counted(config: DistillConfig, sources: Sequence[Source]) -> Iterable[str] | Mapping[int, int]:
    """The texts in which `--trim-vocabulary` counts tokens, or these counts."""
    if config.tokens is None:
        return islice(document_texts(sources), config.trim_vocabulary_documents)
    if config.trim_vocabulary is None:
        return ()
    return TokenShards(Path(config.tokens)).token_counts(config.trim_vocabulary_documents)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Selects deterministic CUDA algorithms, for the backward of some operators. CPU algorithms are deterministic."""
    if device.type != "cuda":
        yield
        return
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read on the first use of cuBLAS
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = False  # otherwise every new tensor is written twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        memory.fill_uninitialized_memory = fills


def _result(config: DistillConfig, output: Path, step: int, stopped_by: int | None) -> DistillResult:
    student = output / STUDENT if stopped_by is None else None
    best = config.load_best_model_at_end and student is not None
    before, after = eval_records(output / METRICS, best=best) or (None, None)
    return DistillResult(student, output / METRICS, step, before, after, stopped_by)
