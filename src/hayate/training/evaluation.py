"""Looking at a model in training: its loss on held-out text, and what it writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hayate.kernels import training as ops
from hayate.text.tokenizer import Tokenizer
from hayate.training.config import TrainConfig
from hayate.training.forward import TrainingBatch, TrainingModel
from hayate.training.parallel import World
from hayate.training.token_file import TokenFile
from hayate.training.token_stream import TokenStream


class Evaluator:
    """Evaluates always on the same windows: the first of each held-out file, shared among the processes."""

    def __init__(
        self,
        model: TrainingModel,
        files: Sequence[TokenFile],
        config: TrainConfig,
        tokenizer: Path,
        world: World,
    ) -> None:
        self.model, self.config, self.world = model, config, world
        L = config.batch.sequence_length
        self.streams = [
            TokenStream([file], sequence_length=L, shuffle=False)
            for file in files
            if file.num_tokens > L
        ]
        self.tokenizer = Tokenizer(tokenizer) if config.eval.prompts else None

    def run(self, step: int) -> list[dict[str, Any]]:
        """Rows for the log: one a held-out file, one a prompt. Called by all processes; the first continues prompts."""
        rows = []
        for stream in self.streams:
            loss, num_targets = self._loss(stream)
            rows.append(
                {
                    "kind": "eval",
                    "step": step,
                    "data": str(stream.files[0].path.parent),
                    "loss": loss,
                    "perplexity": math.exp(min(loss, 100.0)),
                    "targets": num_targets,
                }
            )
        for prompt in self.config.eval.prompts if self.world.is_first else ():
            rows.append(
                {"kind": "sample", "step": step, "prompt": prompt, "text": self._continue(prompt)}
            )
        return rows

    @torch.no_grad()
    def _loss(self, stream: TokenStream) -> tuple[float, int]:
        """Mean loss a target, in nats."""
        config, device = self.config, self.model.head.device
        wanted = max(config.eval.tokens // config.batch.sequence_length, 1)
        count = min(wanted, stream.num_sequences)
        total, num_targets = torch.zeros((), dtype=torch.float64, device=device), 0
        for window in range(self.world.rank, count, self.world.size):
            batch = stream.batch(window, 1)
            on_device = TrainingBatch.of(batch, device)
            hidden, _ = self.model.hidden_states(on_device)
            losses = ops.linear_cross_entropy_per_token(hidden, self.model.head, on_device.targets)
            total += losses.double().sum()
            num_targets += batch.num_targets
        self.world.sum_([total])
        num_targets = self.world.sum_on_host(num_targets)
        return float(total) / max(num_targets, 1), num_targets

    @torch.no_grad()
    def _continue(self, prompt: str) -> str:
        """The greedy continuation of `prompt`, by whole forward passes: short, and nothing else needs memory."""
        assert self.tokenizer is not None
        ids = self.tokenizer.encode(prompt)
        L, device = self.config.batch.sequence_length, self.model.head.device
        generated: list[int] = []
        for _ in range(min(self.config.eval.sample_tokens, L - len(ids))):
            tokens = torch.tensor(ids + generated, device=device)
            batch = TrainingBatch(
                tokens,
                torch.full_like(tokens, -100),
                torch.arange(len(tokens), device=device),
                torch.zeros(len(tokens), dtype=torch.int32, device=device),
                len(tokens),
            )
            hidden, _ = self.model.hidden_states(batch)
            generated.append(int((self.model.head @ hidden[-1]).argmax()))
            if generated[-1] in self.tokenizer.eos_token_ids:
                break
        return self.tokenizer.decode(generated)
