"""Trains every other layer of a model on masked words and on the model's relations, in a plain PyTorch loop.

    python examples/plain_loop.py TEACHER TEXT OUTPUT

TEACHER is a folder or a name on the hub. TEXT has one document per line; the last tenth is the eval set.
"""

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

from minilm_kernels import MiniLMv2Loss, copied_student
from minilm_kernels.integrations import RelationTerm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "text", "output"):
        parser.add_argument(name)
    for name, default in (("relation-heads", 48), ("max-steps", 10_000), ("batch-size", 32), ("learning-rate", 3e-4)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, teacher = AutoTokenizer.from_pretrained(args.teacher), AutoModelForMaskedLM.from_pretrained(args.teacher)
    copied = copied_student(teacher, range(2, teacher.config.num_hidden_layers + 1, 2))
    student = AutoModelForMaskedLM.from_config(copied.config).to(device)
    student.base_model.load_state_dict(copied.state_dict(), strict=False)  # without its pooler
    term = RelationTerm(student, teacher, MiniLMv2Loss(args.relation_heads))

    lines = Path(args.text).read_text("utf-8").splitlines()
    samples = [tokenizer(line, truncation=True, max_length=512) for line in lines]
    split, collate = len(samples) * 9 // 10, DataCollatorForLanguageModeling(tokenizer)
    train = DataLoader(samples[:split], args.batch_size, shuffle=True, collate_fn=collate)
    eval_batches = [batch.to(device) for batch in DataLoader(samples[split:], args.batch_size, collate_fn=collate)]

    def losses(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        term.run_teacher(**batch)
        return student(**batch).loss, term.value(batch["attention_mask"])

    @torch.no_grad()
    def evaluate() -> float:
        student.eval()
        return sum(losses(batch)[1].item() for batch in eval_batches) / len(eval_batches)

    before, optimizer = evaluate(), torch.optim.AdamW(student.parameters(), args.learning_rate)
    for batch in islice(chain.from_iterable(repeat(train)), args.max_steps):
        student.train()
        sum(losses(batch.to(device))).backward()
        optimizer.step()
        optimizer.zero_grad()
    student.save_pretrained(args.output)
    print(f"eval KL {before:.4f} before, {evaluate():.4f} after")


if __name__ == "__main__":
    main()
