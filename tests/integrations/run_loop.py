"""Runs examples in as many processes as torchrun has started: FOLDER RUNS.

RUNS is JSON: a list of the name of an example, the name of its output and its arguments. "trained" is the output of an
example as it is. Others take one step of SGD on fewer rows, with a learning rate that is so large that the saved
student gives the gradient in float32's precision.
"""

import functools
import importlib
import json
import sys

import lightning
import torch
from torch import distributed
from transformers import DataCollatorForLanguageModeling

from tests.integrations.tiny import RELATION_HEADS
from tests.processes import end_process

QUIET = {"logger": False, "enable_progress_bar": False}
SIZES = {"layers": 2, "width": 16, "heads": 4, "relation_heads": RELATION_HEADS}


class FixedMasks:
    """Collates rows. Every third token is masked, so that the batch does not matter."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, rows):
        batch = self.tokenizer.pad(rows, return_tensors="pt")
        chosen = (torch.arange(batch["input_ids"].shape[1]) % 3 == 1) & (batch["attention_mask"] != 0)
        batch["labels"] = batch["input_ids"].masked_fill(~chosen, -100)
        batch["input_ids"] = batch["input_ids"].masked_fill(chosen, self.tokenizer.mask_token_id)
        return batch


def main(folder: str, runs: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    adamw, trainer = torch.optim.AdamW, lightning.Trainer
    processes = distributed.get_world_size()
    for name, output, arguments in json.loads(runs):
        example = importlib.import_module(f"examples.{name}")
        lightning.Trainer = functools.partial(trainer, accelerator="cpu", devices=processes, **QUIET)
        inputs = [f"{folder}/teacher", f"{folder}/long.txt", f"{folder}/{name}-{output}"]
        if output == "trained":
            torch.optim.AdamW, example.DataCollatorForLanguageModeling = adamw, DataCollatorForLanguageModeling
        else:
            torch.optim.AdamW = lambda parameters, lr: torch.optim.SGD(parameters, lr=4096.0)
            example.DataCollatorForLanguageModeling = FixedMasks
            inputs[1] = f"{folder}/short.txt"
        if distributed.get_rank() == 0:
            print(f"[{name} {output}]")
        torch.manual_seed(0)
        example.main(*inputs, **SIZES, **arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process()
