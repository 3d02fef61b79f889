"""Masked LM and the relation loss with FSDP2: torchrun --nproc-per-node 8 examples/fsdp2_loop.py MODEL TEXT OUTPUT."""

import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

from minilm_kernels import MiniLMv2Loss, student_config
from minilm_kernels.integrations import RelationTerm


def main(teacher, text, output, layers=6, width=384, heads=12, relation_heads=48, epochs=10, batch_size=32):
    torch.manual_seed(0)  # the same student in every process
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tokenizer, teacher = AutoTokenizer.from_pretrained(teacher), AutoModelForMaskedLM.from_pretrained(teacher)
    student = AutoModelForMaskedLM.from_config(student_config(teacher.config, layers, width, num_attention_heads=heads))
    for module in (*student.base_model.encoder.layer, student):
        fully_shard(module)
    term = RelationTerm(student, teacher, MiniLMv2Loss(relation_heads))
    optimizer = torch.optim.AdamW(student.parameters(), lr=6e-4)
    rows = [tokenizer(line, truncation=True, max_length=128) for line in Path(text).read_text("utf-8").splitlines()]
    eval_batch, rows = tokenizer.pad(rows[:64], return_tensors="pt").to(device), rows[64:]
    sampler, collate = DistributedSampler(rows), DataCollatorForLanguageModeling(tokenizer)

    @torch.no_grad()
    def eval_kl():
        term.run_teacher(**eval_batch)
        student.eval()(**eval_batch)
        student.train()
        return term.value(eval_batch["attention_mask"]).item()

    before = eval_kl()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in DataLoader(rows, batch_size, sampler=sampler, collate_fn=collate, drop_last=True):
            labels = batch.to(device).pop("labels")
            torch.distributed.all_reduce(masked := (labels != -100).sum())
            term.run_teacher(**batch)
            masked_lm = cross_entropy(student(**batch).logits.flatten(0, 1), labels.flatten(), reduction="sum")
            loss = masked_lm * torch.distributed.get_world_size() / masked  # FSDP2 takes the mean of the gradients
            (loss + term.value(batch["attention_mask"])).backward()
            optimizer.step()
            optimizer.zero_grad()
    after = eval_kl()
    weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank() == 0:
        print(f"eval KL {before:.4f} before, {after:.4f} after")
        student.save_pretrained(output, state_dict=weights)
        tokenizer.save_pretrained(output)


if __name__ == "__main__":
    torch.distributed.init_process_group()
    main(*sys.argv[1:4])
    torch.distributed.destroy_process_group()
