"""Masked LM and the relation loss with Accelerate: accelerate launch examples/accelerate_loop.py MODEL TEXT OUTPUT."""

import sys
from contextlib import nullcontext
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

from minilm_kernels import MiniLMv2Loss, student_config
from minilm_kernels.integrations import RelationTerm


def main(
    teacher, text, output, layers=6, width=384, heads=12, relation_heads=48, steps=1000, batch_size=32, micro_batches=4
):
    torch.manual_seed(0)  # the same student in every process
    accelerator, tokenizer = Accelerator(), AutoTokenizer.from_pretrained(teacher)
    teacher = AutoModelForMaskedLM.from_pretrained(teacher)
    student = AutoModelForMaskedLM.from_config(student_config(teacher.config, layers, width, num_attention_heads=heads))
    rows = [tokenizer(line, truncation=True, max_length=128) for line in Path(text).read_text("utf-8").splitlines()]
    eval_batch = tokenizer.pad(rows[:64], return_tensors="pt").to(accelerator.device)
    loader = DataLoader(rows[64:], batch_size, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer))
    optimizer = torch.optim.AdamW(student.parameters(), lr=6e-4)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    term = RelationTerm(student, teacher, MiniLMv2Loss(relation_heads))

    @torch.no_grad()
    def eval_kl():
        term.run_teacher(**eval_batch)
        student.eval()(**eval_batch)
        student.train()
        return term.value(eval_batch["attention_mask"]).item()

    before, batches = eval_kl(), chain.from_iterable(repeat(loader))
    for _ in range(steps):
        step = list(islice(batches, micro_batches))
        totals = torch.tensor([[len(b["labels"]), (b["labels"] != -100).sum()] for b in step]).sum(0)
        sequences, masked = accelerator.reduce(totals.to(accelerator.device)).tolist()
        for batch in step:
            with nullcontext() if batch is step[-1] else accelerator.no_sync(student):
                labels = batch.pop("labels")
                term.run_teacher(**batch)
                logits = student(**batch).logits.flatten(0, 1)
                loss = cross_entropy(logits, labels.flatten(), reduction="sum") / masked
                loss += term.value(batch["attention_mask"]) * len(labels) / sequences
                accelerator.backward(loss * accelerator.num_processes)  # DDP takes the mean of the gradients
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"eval KL {before:.4f} before, {eval_kl():.4f} after")
    accelerator.unwrap_model(student).save_pretrained(output, is_main_process=accelerator.is_main_process)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:4])
