"""Distils the relations of a model into a student that keeps every other layer, with transformers' Trainer.

    python examples/transformers_trainer.py TEACHER TEXT OUTPUT
    torchrun --nproc-per-node 8 examples/transformers_trainer.py TEACHER TEXT OUTPUT

TEACHER is a folder or a name on the hub, such as bert-base-uncased. TEXT is a text file with one document per line; the
last tenth is the eval set.
"""

import argparse
import gc

import torch
from datasets import load_dataset
from transformers import AutoModel, AutoTokenizer

from minilm_kernels import MiniLMv2Loss, copied_student
from minilm_kernels.integrations import RelationTrainer, RelationTrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "text", "output"):
        parser.add_argument(name)
    parser.add_argument("--relation-heads", type=int, default=48)
    parser.add_argument("--max-steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()

    tokenizer, teacher = AutoTokenizer.from_pretrained(args.teacher), AutoModel.from_pretrained(args.teacher)
    student = copied_student(teacher, range(2, teacher.config.num_hidden_layers + 1, 2))
    text = load_dataset("text", data_files=args.text, split="train").train_test_split(0.1, shuffle=False)
    tokens = text.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=512), batched=True)

    options = {"max_steps": args.max_steps, "per_device_train_batch_size": args.batch_size, "report_to": "none"}
    options |= {"learning_rate": args.learning_rate, "use_cpu": not torch.cuda.is_available()}
    trainer = RelationTrainer(
        student,
        RelationTrainingArguments(args.output, **options),
        teacher=teacher,
        relation_loss=MiniLMv2Loss(args.relation_heads),
        processing_class=tokenizer,  # the collator pads with it
        train_dataset=tokens["train"],
        eval_dataset=tokens["test"],
    )
    before = trainer.evaluate()["eval_relation_kl"]
    trainer.train()
    trainer.save_model(args.output)
    after = trainer.evaluate()["eval_relation_kl"]
    if trainer.is_world_process_zero():
        print(f"eval KL {before:.4f} before, {after:.4f} after")


if __name__ == "__main__":
    main()
    gc.collect()  # models may hold the processes' group, and a process that ends with one may abort
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
