"""Distils a decoder on the text that the student generates, with TRL: logits and relations.

    python examples/trl_trainer.py TEACHER STUDENT PROMPTS OUTPUT

PROMPTS is a text file with one prompt per line; the last tenth is the eval set. TEACHER and STUDENT are folders or
names on the hub, with one tokenizer. The student needs no particular size.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig

from minilm_kernels import MiniLMv2Loss
from minilm_kernels.integrations import RelationDistillationTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("output")
    parser.add_argument("--relation-heads", type=int, default=16)
    parser.add_argument("--relation-weight", type=float, default=1.0)
    parser.add_argument("--max-completion-length", type=int, default=256)
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    args = parser.parse_args()

    prompts = [{"prompt": line} for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    split = len(prompts) * 9 // 10
    trainer = RelationDistillationTrainer(
        AutoModelForCausalLM.from_pretrained(args.student),
        AutoModelForCausalLM.from_pretrained(args.teacher),
        DistillationConfig(
            args.output,
            max_steps=args.max_steps,
            max_completion_length=args.max_completion_length,
            learning_rate=args.learning_rate,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(prompts[:split]),
        eval_dataset=Dataset.from_list(prompts[split:]),
        processing_class=AutoTokenizer.from_pretrained(args.student, padding_side="left"),
        relation_loss=MiniLMv2Loss(args.relation_heads, reduction="token"),
        relation_weight=args.relation_weight,
    )
    before = trainer.evaluate()["eval_relation_kl"]
    trainer.train()
    trainer.save_model(args.output)
    print(f"eval KL {before:.4f} before, {trainer.evaluate()['eval_relation_kl']:.4f} after")


if __name__ == "__main__":
    main()
