"""Masked LM and the relation loss with Lightning: python examples/lightning_module.py MODEL TEXT OUTPUT."""

import sys
from pathlib import Path

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorWithPadding

from minilm_kernels import MiniLMv2Loss, student_config
from minilm_kernels.integrations import RelationTerm


class Distillation(lightning.LightningModule):
    def __init__(self, student, teacher, relation_heads, micro_batch):
        super().__init__()
        self.automatic_optimization = False  # Lightning would give every micro-batch the same weight
        self.student, self.micro_batch = student, micro_batch
        self.term = RelationTerm(student, teacher, MiniLMv2Loss(relation_heads))

    def training_step(self, batch, _):
        counts = torch.tensor([len(batch["labels"]), (batch["labels"] != -100).sum()], device=self.device)
        sequences, masked = self.all_gather(counts).view(-1, 2).float().mean(0)  # DDP takes the mean of the gradients
        for start in range(0, len(batch["labels"]), self.micro_batch):
            inputs = {name: x[start : start + self.micro_batch] for name, x in batch.items()}
            labels = inputs.pop("labels")
            self.term.run_teacher(**inputs)
            logits = self.student(**inputs).logits.flatten(0, 1)
            masked_lm = cross_entropy(logits, labels.flatten(), reduction="sum") / masked
            self.manual_backward(masked_lm + self.term.value(inputs["attention_mask"]) * len(labels) / sequences)
        self.optimizers().step()
        self.zero_grad()

    def validation_step(self, batch, _):
        self.term.run_teacher(**batch)
        self.student(**batch)
        self.log("eval_kl", self.term.value(batch["attention_mask"]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=6e-4)


def main(teacher, text, output, layers=6, width=384, heads=12, relation_heads=48, steps=1000, micro_batch=8):
    lightning.seed_everything(0)
    tokenizer, teacher = AutoTokenizer.from_pretrained(teacher), AutoModelForMaskedLM.from_pretrained(teacher)
    student = AutoModelForMaskedLM.from_config(student_config(teacher.config, layers, width, num_attention_heads=heads))
    rows = [tokenizer(line, truncation=True, max_length=128) for line in Path(text).read_text("utf-8").splitlines()]
    eval_loader = DataLoader(rows[:64], 64, collate_fn=DataCollatorWithPadding(tokenizer))
    module, trainer = Distillation(student, teacher, relation_heads, micro_batch), lightning.Trainer(max_steps=steps)
    trainer.validate(module, eval_loader)  # prints the eval KL
    trainer.fit(module, DataLoader(rows[64:], 32, True, collate_fn=DataCollatorForLanguageModeling(tokenizer)))
    trainer.validate(module, eval_loader)
    student.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:4])
