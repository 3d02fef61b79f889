"""The relation loss in a loop with Accelerate: accelerate launch examples/accelerate_loop.py MODEL TEXT OUTPUT."""

import sys
from contextlib import nullcontext
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from minilm_kernels import MiniLMv2Loss, QKVExtractor, student_config


def main(model, text, output, layers=6, width=384, heads=12, relation_heads=48, steps=1000, batch_size=32, parts=4):
    accelerator, loss_fn = Accelerator(), MiniLMv2Loss(relation_heads)
    tokenizer, model = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model)
    student = AutoModel.from_config(student_config(model.config, layers, width, num_attention_heads=heads))
    teacher, qkv = QKVExtractor(model.to(accelerator.device), frozen=True), QKVExtractor(student)
    rows = [tokenizer(line, truncation=True, max_length=128) for line in Path(text).read_text("utf-8").splitlines()]
    loader = torch.utils.data.DataLoader(rows, batch_size, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    qkv, optimizer, loader = accelerator.prepare(qkv, torch.optim.AdamW(qkv.parameters(), lr=6e-4), loader)
    batches = chain.from_iterable(repeat(loader))
    for number in range(1, steps + 1):
        step = list(islice(batches, parts))
        count = accelerator.reduce(torch.tensor(sum(len(b["input_ids"]) for b in step), device=accelerator.device))
        for batch in step:
            with nullcontext() if batch is step[-1] else accelerator.no_sync(qkv):
                loss = loss_fn(teacher(**batch), qkv(**batch), batch["attention_mask"])
                accelerator.backward(loss * len(batch["input_ids"]) / count * accelerator.num_processes)  # DDP's mean
        accelerator.print(f"step {number}: KL {loss:.4f}")
        optimizer.step()
        optimizer.zero_grad()
    student.save_pretrained(output, is_main_process=accelerator.is_main_process)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:4])
    Accelerator().end_training()
