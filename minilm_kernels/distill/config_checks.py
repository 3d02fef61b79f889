"""Validation of a `DistillConfig`: the range of each option, and options that exclude or require each other."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from .config_values import flag, show, shown

if TYPE_CHECKING:
    from .config import DistillConfig

DEFAULT_RELATIONS = {"qq": 1.0, "kk": 1.0, "vv": 1.0}


def check_ranges(config: DistillConfig) -> None:
    """Raises a `ValueError` that names the first option whose value is outside its range."""
    for option in fields(config):
        value, largest = getattr(config, option.name), option.metadata["largest"]
        if option.metadata["positive"] and value is not None and not value > 0:
            raise ValueError(f"{flag(option.name)} must be positive, got {value}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and abs(number) > largest:
                raise ValueError(f"{flag(option.name)} must be at most {largest}, got {shown(number)}")
    for name in ("warmup_steps", "weight_decay", "max_grad_norm", "seed"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise ValueError(f"{flag(name)} must not be negative, got {value}")
    if config.max_seq_length < 8:
        raise ValueError(f"--max-seq-length must be at least 8, got {config.max_seq_length}")
    if config.max_document_length is not None and not 8 <= config.max_document_length <= config.max_seq_length:
        raise ValueError(
            f"--max-document-length must be from 8 to --max-seq-length ({config.max_seq_length}), got "
            f"{config.max_document_length}"
        )
    if config.dropout is not None and not 0 <= config.dropout < 1:
        raise ValueError(f"--dropout must be in [0, 1), got {config.dropout}")
    if not 0 <= config.eval_fraction < 1:
        raise ValueError(f"--eval-fraction must be in [0, 1), got {config.eval_fraction}")
    if not all(0 <= beta < 1 for beta in config.adam_betas):
        raise ValueError(f"--adam-betas must be in [0, 1), got {config.adam_betas}")
    low, high = config.prefix_range
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--prefix-range must be LOW,HIGH with 0 <= LOW <= HIGH <= 1, got {low},{high}")
    for name in ("teacher_layer", "student_layer", "copy_layers"):
        value = getattr(config, name)
        if value == 0 or (isinstance(value, tuple) and 0 in value):
            raise ValueError(f"{flag(name)} counts from 1 (or from -1 backwards), got {show(value)}")
    if config.copy_layers == ():
        raise ValueError("--copy-layers: expected at least one of the teacher's layers, got none")
    for name in ("teacher_projections", "student_projections"):
        value = getattr(config, name)
        if value is not None and len(value) not in (1, 3):
            raise ValueError(
                f"{flag(name)}: expected three names, of query, key and value, or one name, got {len(value)}"
            )


def check_combinations(config: DistillConfig) -> None:
    """Raises a `ValueError` that names options which exclude each other, or an option that requires another one."""
    if config.method == "minilm" and config.relation_heads is not None:
        raise ValueError("--relation-heads belongs to --method minilmv2; minilm uses the attention heads")
    if config.method == "minilm" and config.relations != DEFAULT_RELATIONS:
        raise ValueError("--relations belongs to --method minilmv2; minilm has the relations qk and vv")
    copied = config.student_init == "copy"
    if copied and config.student_hidden_size is not None:
        raise ValueError("--student-init copy keeps the teacher's sizes; leave out --student-hidden-size")
    if (config.student_num_hidden_layers is None) != (config.student_hidden_size is None) and not copied:
        raise ValueError("a new student needs both --student-num-hidden-layers and --student-hidden-size")
    students = {
        "--student": config.student,
        "--copy-layers": config.copy_layers,
        "--student-num-hidden-layers": config.student_num_hidden_layers,
    }
    given = [name for name, value in students.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(students)}, got {' and '.join(given) or 'none of them'}")
    if config.student_init != "random" and config.student_num_hidden_layers is None:
        raise ValueError(f"--student-init {config.student_init} belongs to --student-num-hidden-layers")
    if bool(config.text) + bool(config.dataset_name) + bool(config.tokens) != 1:
        raise ValueError("give the training text as exactly one of --text, --dataset-name and --tokens")
    if config.tokens is not None and config.max_train_documents is not None:
        raise ValueError(
            "--max-train-documents belongs to --text and --dataset-name; give it to minilm-distill prepare"
        )
    if config.attention == "packed" and not config.packing:
        raise ValueError("--attention packed belongs to --packing")
    if config.warmup_steps is not None and config.warmup_steps > config.max_steps:
        raise ValueError(f"--warmup-steps ({config.warmup_steps}) must not exceed --max-steps ({config.max_steps})")
    if config.load_best_model_at_end and not (config.eval_text or config.eval_fraction):
        raise ValueError("--load-best-model-at-end needs evaluations: give --eval-text, or --eval-fraction above 0")
    for name in ("hub_model_id", "hub_private_repo"):
        if getattr(config, name) and not config.push_to_hub:
            raise ValueError(f"{flag(name)} belongs to --push-to-hub")
    for name in ("teacher_assistant", "torch_compile"):
        if config.parallel == "fsdp" and getattr(config, name):
            raise ValueError(f"--parallel fsdp and {flag(name)} exclude each other")
    if config.micro_batch_size is not None and config.gradient_accumulation_steps > 1:
        raise ValueError("--micro-batch-size and --gradient-accumulation-steps exclude each other; give one of them")
    if config.torch_compile and not config.packing:
        raise ValueError("--torch-compile needs --packing, because without it every batch has another length")
    if config.total_batch_size % config.gradient_accumulation_steps:
        raise ValueError(
            f"--gradient-accumulation-steps ({config.gradient_accumulation_steps}) must divide --total-batch-size "
            f"({config.total_batch_size})"
        )
