"""Fine-tunes a student as a sequence-to-sequence model with UniLM's mask, and generates with it.

    minilm-distill --mask prefix ... --output-dir RUN
    python examples/seq2seq_generation.py RUN/student PAIRS OUTPUT

PAIRS has JSON lines with `source` and `target`; the last tenth is generated and compared.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from minilm_kernels import prefix_mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "pairs", "output"):
        parser.add_argument(name)
    for name, default in (("epochs", 25), ("batch-size", 32), ("learning-rate", 1e-4), ("max-new-tokens", 48)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForMaskedLM.from_pretrained(args.student).to(device)  # its output embeddings are the input's
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    pairs = [json.loads(line) for line in Path(args.pairs).read_text("utf-8").splitlines()]
    train, held_out = pairs[: len(pairs) * 9 // 10], pairs[len(pairs) * 9 // 10 :]

    def encode(pairs: list[dict[str, str]], targets: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[CLS] source [SEP] (target [SEP]): ids and their mask, and the prefix lengths."""
        texts = [[pair["source"] for pair in pairs], [pair["target"] for pair in pairs]]
        prefix_lens = torch.tensor([len(ids) for ids in tokenizer(texts[0])["input_ids"]], device=device)
        batch = tokenizer(*texts[: 1 + targets], padding=True, padding_side="right", return_tensors="pt").to(device)
        return batch["input_ids"], batch["attention_mask"], prefix_lens

    def logits(ids: torch.Tensor, mask: torch.Tensor, prefix_lens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=prefix_mask(mask, prefix_lens, model.dtype)).logits

    @torch.no_grad()
    def generate(pairs: list[dict[str, str]]) -> list[str]:
        ids, mask, prefix_lens = encode(pairs, targets=False)
        new = ids.new_full((len(pairs), args.max_new_tokens), tokenizer.pad_token_id)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.zeros_like(new)], 1)
        rows = torch.arange(len(ids), device=device)
        for step in range(args.max_new_tokens):  # each row continues where its own source ends
            last = prefix_lens + step - 1
            mask[rows, last + 1] = 1
            ids[rows, last + 1] = logits(ids, mask, prefix_lens)[rows, last].argmax(-1)
        texts = [row[n:].tolist() for row, n in zip(ids, prefix_lens, strict=True)]
        ends = [text.index(tokenizer.sep_token_id) if tokenizer.sep_token_id in text else None for text in texts]
        return [tokenizer.decode(text[:end]) for text, end in zip(texts, ends, strict=True)]

    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate)
    steps = args.epochs * -(-len(train) // args.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(args.epochs):
        for chosen in torch.randperm(len(train)).split(args.batch_size):
            ids, mask, prefix_lens = encode([train[k] for k in chosen], targets=True)
            positions = torch.arange(ids.shape[1], device=device)
            target = mask.bool() & (positions >= prefix_lens[:, None])  # each is predicted by the token before it
            predicted = logits(ids, mask, prefix_lens)[:, :-1][target[:, 1:]]
            torch.nn.functional.cross_entropy(predicted, ids[target], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    found = [text for k in range(0, len(held_out), 64) for text in generate(held_out[k : k + 64])]
    for pair, text in list(zip(held_out, found, strict=True))[:3]:
        print(f"{pair['source']} -> {text}")
    right = sum(text == pair["target"] for text, pair in zip(found, held_out, strict=True))
    print(f"exact match {right / len(held_out):.3f}")


if __name__ == "__main__":
    main()
