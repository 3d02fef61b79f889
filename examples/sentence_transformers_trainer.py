"""Distils a sentence-transformers model into a student that keeps every other layer.

    python examples/sentence_transformers_trainer.py TEACHER SENTENCES OUTPUT

SENTENCES is a text file with one sentence per line; the last tenth is the eval set. TEACHER is a folder or a name on
the hub, of a BERT or RoBERTa model. Beside the relations, the student learns the embeddings of the teacher.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MSELoss

from minilm_kernels import MiniLMv2Loss
from minilm_kernels.integrations import RelationDistillLoss, RelationKLEvaluator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("sentences", type=Path)
    parser.add_argument("output")
    parser.add_argument("--relation-heads", type=int, default=48)
    parser.add_argument("--max-steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args()

    teacher, student = SentenceTransformer(args.teacher), SentenceTransformer(args.teacher)
    model = student.transformers_model
    model.encoder.layer = model.encoder.layer[1::2]
    model.config.num_hidden_layers = len(model.encoder.layer)

    sentences = args.sentences.read_text(encoding="utf-8").splitlines()
    split = len(sentences) * 9 // 10
    train = Dataset.from_dict({"sentence": sentences[:split], "label": teacher.encode(sentences[:split])})
    relation_loss = MiniLMv2Loss(args.relation_heads)
    loss = RelationDistillLoss(student, teacher, relation_loss, embedding_loss=MSELoss(student))
    evaluator = RelationKLEvaluator(sentences[split:], loss)
    before = evaluator(student)["relation_kl"]

    arguments = SentenceTransformerTrainingArguments(
        args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        report_to="none",
    )
    SentenceTransformerTrainer(student, arguments, train_dataset=train, loss=loss).train()
    student.save_pretrained(args.output)
    print(f"eval KL {before:.4f} before, {evaluator(student)['relation_kl']:.4f} after")


if __name__ == "__main__":
    main()
