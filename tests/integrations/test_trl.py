"""RelationDistillationTrainer with tiny decoders."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer

from minilm_kernels import MiniLMLoss, MiniLMv2Loss, QKVExtractor
from minilm_kernels.integrations import RelationDistillationTrainer
from tests.distill.tiny import make_texts, make_tokenizer
from tests.integrations.tiny import RELATION_HEADS, make
from tests.processes import run_two

TOKEN = MiniLMv2Loss(RELATION_HEADS, reduction="token")
PROMPTS = make_texts(16, 1, 10)


def tokenizer() -> PreTrainedTokenizerFast:
    made = make_tokenizer()
    made.padding_side = "left"
    made.eos_token, made.bos_token = "[SEP]", "[CLS]"
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


def decoder(seed: int, **overrides) -> PreTrainedModel:
    """Four query heads, two key heads."""
    return make("qwen3", "causal-lm", seed=seed, **overrides)


def trainer_of(
    folder: Path,
    relation_loss=TOKEN,
    relation_weight: float = 1.0,
    of: type[RelationDistillationTrainer] = RelationDistillationTrainer,
    peft_config=None,
    teacher: bool = True,
    **options,
) -> RelationDistillationTrainer:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no"}
    defaults = {"max_completion_length": 6, "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1}
    data = Dataset.from_dict({"prompt": PROMPTS})
    return of(
        model=decoder(0),
        teacher_model=decoder(1, hidden_size=48) if teacher else None,
        args=DistillationConfig(output_dir=str(folder), **(quiet | defaults | options)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        peft_config=peft_config,
        relation_loss=relation_loss,
        relation_weight=relation_weight,
    )


def rows_of(count: int = 8) -> dict[str, torch.Tensor]:
    """A generated batch: prompts padded on the left, completions on the right, some of it from tools."""
    generator = torch.Generator().manual_seed(0)
    prompt, completion = (torch.arange(length).expand(count, -1) for length in (5, 7))
    lengths = torch.randint(1, 6, (2, count, 1), generator=generator)
    masks = {"prompt_mask": (prompt >= 5 - lengths[0]).long(), "completion_mask": (completion < lengths[1] + 1).long()}
    ids = {
        f"{name}_ids": torch.randint(5, 60, mask.shape, generator=generator)
        for name, mask in (("prompt", prompt), ("completion", completion))
    }
    return {**masks, **ids, "tool_mask": torch.randint(0, 2, completion.shape, generator=generator)}


def expected_relation(student, teacher, rows: dict, loss) -> torch.Tensor:
    """The relation loss of one batch, from extractors."""
    batch = {
        "input_ids": torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1),
        "attention_mask": torch.cat([rows["prompt_mask"], rows["completion_mask"]], 1),
    }
    counted = torch.cat([torch.zeros_like(rows["prompt_mask"]), rows["completion_mask"] * rows.get("tool_mask", 1)], 1)
    qkv = QKVExtractor(teacher, frozen=True)(**batch), QKVExtractor(student)(**batch)
    return loss(*qkv, batch["attention_mask"], query_mask=counted, causal=True)


LOSSES = {
    "token": TOKEN,
    "sequence": MiniLMv2Loss(RELATION_HEADS),
    "q-k": MiniLMLoss(4),  # two key heads
    "all": MiniLMv2Loss(
        2, relations={"qq": 1.0, "kk": 0.5, "vv": 2.0, "qk": 0.25}, attention_heads=4, reduction="token"
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_the_completions_count(tmp_path, name):
    trainer, rows = trainer_of(tmp_path, LOSSES[name], relation_weight=0.5), rows_of()
    student, teacher = trainer.model, trainer.teacher_model
    student.eval()
    with torch.no_grad():
        own = DistillationTrainer._compute_loss(trainer, student, rows, None)[0]
    trainer.relation_term.clear()
    found = trainer.compute_loss(student, rows)
    torch.testing.assert_close(found, own + 0.5 * expected_relation(student, teacher, rows, LOSSES[name]))
    assert trainer._metrics["eval"]["relation_kl"] == [pytest.approx(2 * float(found - own), rel=1e-5)]


class FixedCompletions(RelationDistillationTrainer):
    """Trains on given completions instead of generated ones, each process on its share."""

    rows = rows_of(16)

    def _generate_and_score_completions(self, inputs: list) -> dict:
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        items = (self.rows["completion_mask"] * self.rows["tool_mask"]).sum().float()
        self.model(input_ids=self.rows["prompt_ids"])  # generation runs the recorded models, too
        return {name: x[share] for name, x in self.rows.items()} | {"num_items_in_batch": items}


def one_step(folder: Path, size: int, accumulation: int, loss="token", **options) -> dict[str, torch.Tensor]:
    """The gradient of a step on 16 completions with different numbers of tokens, after an evaluation."""
    step = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0}
    trainer = trainer_of(
        folder,
        LOSSES[loss],
        of=FixedCompletions,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        **step,
        **options,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.evaluate()
    trainer.train()
    return {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float = 1e-6) -> None:
    """The largest difference over all parameters, relative to the largest value, is at most `bound`."""
    assert found.keys() == expected.keys()
    largest = max(x.abs().max() for x in expected.values())
    assert largest > 0
    assert max((found[name] - x).abs().max() for name, x in expected.items()) <= bound * largest


@pytest.mark.parametrize("loss", ["token", "sequence"])
def test_micro_batches_equal_one_batch(tmp_path, loss):
    assert_close(one_step(tmp_path, 4, 4, loss), one_step(tmp_path, 16, 1, loss))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tmp_path, reentrant):
    expected = one_step(tmp_path, 16, 1, gradient_checkpointing=False)
    kwargs = {"use_reentrant": reentrant}
    found = one_step(tmp_path, 16, 1, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert_close(found, expected)


def two_processes(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    for loss in ("token", "sequence"):
        torch.save(one_step(Path(folder), 4, 2, loss), Path(folder) / f"{loss}-{rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    run_two(two_processes, tmp_path)
    for loss in ("token", "sequence"):
        expected = one_step(tmp_path, 16, 1, loss)
        for rank in range(2):
            assert_close(torch.load(tmp_path / f"{loss}-{rank}.pt"), expected)


def eval_kl(trainer) -> float:
    student = trainer.model.eval()
    with torch.no_grad():
        return float(expected_relation(student, trainer.teacher_model, rows_of(32), TOKEN))


def test_training(tmp_path):
    trainer = trainer_of(
        tmp_path,
        relation_weight=10.0,
        max_steps=15,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=15,
        eval_strategy="steps",
        eval_steps=5,
    )
    before = eval_kl(trainer)
    trainer.train()
    assert eval_kl(trainer) < 0.9 * before
    logged = trainer.state.log_history
    relations = [entry["relation_kl"] for entry in logged if "relation_kl" in entry]
    assert len(relations) == 15
    assert relations[-1] < relations[0]
    assert sum("eval_relation_kl" in entry for entry in logged) == 3
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-15")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(saved.get_parameter(name), parameter)


@pytest.mark.slow
def test_example(tmp_path):
    for name, model in (("teacher", decoder(1, hidden_size=48)), ("student", decoder(0))):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("\n".join(make_texts(80, 1, 10)), encoding="utf-8")
    script = Path(__file__).resolve().parents[2] / "examples" / "trl_trainer.py"
    command = [sys.executable, script, *(tmp_path / name for name in ("teacher", "student", "prompts.txt", "out"))]
    options = ["--relation-heads=4", "--max-steps=20", "--max-completion-length=6", "--learning-rate=1e-2"]
    run = subprocess.run(
        [*command, *options, "--relation-weight=10"], capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr
    before, after = map(float, re.search(r"eval KL (\S+) before, (\S+) after", run.stdout).groups())
    assert after < before
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_adapters(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])
    trainer = trainer_of(tmp_path, relation_weight=10.0, peft_config=config, max_steps=8, learning_rate=5e-2)
    before = eval_kl(trainer)
    trainer.train()
    assert eval_kl(trainer) < 0.95 * before


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="teacher_model"):
        trainer_of(tmp_path, teacher=False)
    with pytest.raises(ValueError, match='"sequence" or "token", got \'sum\''):
        trainer_of(tmp_path, MiniLMv2Loss(RELATION_HEADS, reduction="sum"))
