"""minilm-distill in the workers of a Ray cluster: python examples/ray_train.py WORKERS SETTINGS.yaml.

SETTINGS.yaml has the options of minilm-distill. Its paths are absolute, and output_dir is on a disk that all machines
share. If a worker ends, Ray starts all of them again, and they continue from the newest checkpoint.
"""

import sys
from pathlib import Path

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from minilm_kernels.distill import DistillConfig, distill
from minilm_kernels.distill.config_file import read_settings


def work(settings):
    distill(DistillConfig.from_mapping({**settings, "resume_from_checkpoint": True}))


def main(workers, file, failures=3):
    settings = read_settings(file)
    log = str(Path(settings["output_dir"], "ray"))
    TorchTrainer(
        work,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(storage_path=log, failure_config=FailureConfig(max_failures=failures)),
    ).fit()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
