"""hayate's training loop on the workers of a Ray cluster. Workers that fail are started again and go on."""

import argparse
from pathlib import Path

import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device

from hayate.training.config import load_train_config
from hayate.training.loop import Trainer
from hayate.training.parallel import World
from hayate.training.state import find_checkpoints


def train(arguments: dict[str, str]) -> None:
    """What each worker does. Ray has connected them."""
    local_size = ray.train.get_context().get_local_world_size()
    world = World.of_process_group(get_device(), local_size=local_size)
    config = load_train_config(Path(arguments["config"]), {"data.train": arguments["data"]})
    resume = bool(find_checkpoints(Path(config.output)))
    trainer = Trainer(config, world=world, resume=resume, report=print)
    trainer.train()
    ray.train.report({"step": trainer.progress.step})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="TOML file; its output must be a path that all machines see")
    parser.add_argument("--data", required=True, help="folder of `hayate data prepare`, likewise")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    job = TorchTrainer(
        train,
        train_loop_config={
            "config": str(Path(options.config).resolve()),
            "data": str(Path(options.data).resolve()),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=options.workers, use_gpu=torch.cuda.is_available()
        ),
        run_config=ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=3)),
    )
    job.fit()
