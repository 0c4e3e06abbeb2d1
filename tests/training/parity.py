"""One training step against transformers and torch.optim.AdamW: `python -m tests.training.parity` prints a table.

Loss, gradients and updated weights, in fp32 on the CPU, for tiny random models with one document a sequence.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hayate.checkpoint.writer import save
from hayate.models.weights import placements
from hayate.training.forward import TrainingBatch
from hayate.training.loop import Trainer
from hayate.training.loss import LossParts, StepSize
from tests.training.models import write_model
from tests.training.runs import make_data, tiny_config, trainer

CLIP, LR, DECAY = 0.5, 1e-3, 0.1


@dataclass(frozen=True)
class StepParity:
    """Our step beside theirs."""

    kind: str
    loss: float
    loss_error: float  # relative
    gradient_error: (
        float  # largest, relative to the largest gradient of the same tensor; the worst tensor
    )
    weight_error: float  # largest, as a share of the learning rate
    weights_off: float  # share of all weights that differ by more than 1 % of the learning rate


def compare_step(kind: str, folder: Path) -> StepParity:
    """One step of the architecture `kind`, with files in `folder`."""
    source = write_model(folder / kind, kind)
    config = tiny_config(
        make_data(folder / "data"),
        folder / "run",
        model__preset=None,
        model__init_from=str(source),
        loss__balance="none",
        loss__z="0",
        optimizer__clip=str(CLIP),
        optimizer__lr=str(LR),
        optimizer__weight_decay=str(DECAY),
    )
    run = trainer(config)
    batch = run.stream.batch(0, config.sequences_per_step)
    batch.document_starts[:] = 0  # transformers has one document a row
    loss, gradients, weights = _their_step(source, batch.token_ids, batch.targets)

    parts = LossParts.zeros(run.loss.num_sparse, run.loss.num_experts, run.device)
    size = StepSize(batch.num_targets, config.batch.tokens_per_step)
    run.loss.backward(TrainingBatch.of(batch, run.device), size, parts)
    our_gradients = _by_their_names(run, {n: p.grad for n, p in _parameters(run)}, folder / "g")
    run.optimizer.step(LR)
    our_weights = _by_their_names(run, dict(_parameters(run)), folder / "w")

    assert our_gradients.keys() == gradients.keys()
    errors = torch.cat([(our_weights[n] - w).abs().flatten() for n, w in weights.items()]) / LR
    return StepParity(
        kind,
        loss,
        abs(float(parts.cross_entropy) - loss) / loss,
        max(
            float((our_gradients[n] - g).abs().max() / g.abs().max()) for n, g in gradients.items()
        ),
        float(errors.max()),
        float((errors > 0.01).float().mean()),
    )


def _their_step(
    source: Path, token_ids: object, targets: object
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and updated weights of transformers, under the names of the file."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    logits = model(input_ids=torch.as_tensor(token_ids)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.as_tensor(targets).flatten(), ignore_index=-100
    )
    loss.backward()
    gradients = copy.deepcopy(model)
    for parameter, original in zip(gradients.parameters(), model.parameters(), strict=True):
        parameter.data = original.grad.clone()
    apart = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    decays = [p for p in model.parameters() if p.dim() > 1 and id(p) not in apart]
    rest = [p for p in model.parameters() if p.dim() == 1 or id(p) in apart]
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    torch.optim.AdamW(
        [{"params": decays, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-8,
    ).step()
    found = []
    for name, which in (("gradients", gradients), ("updated", model)):
        which.save_pretrained(source / name)
        found.append(load_file(source / name / "model.safetensors"))
    return loss.item(), found[0], found[1]


def _parameters(run: Trainer) -> list[tuple[str, Tensor]]:
    return [(name, p.detach() if p.grad is None else p) for name, p in run.model.named_parameters()]


def _by_their_names(run: Trainer, tensors: dict, folder: Path) -> dict[str, Tensor]:
    save(tensors, placements(run.model.config), folder)
    return load_file(folder / "model.safetensors")


def main() -> None:
    print(
        "| architecture | loss | its error | worst gradient | worst weight / lr | weights off > 1 % of lr |"
    )
    print("|---|---|---|---|---|---|")
    for kind in ("mixtral", "qwen3_moe", "llama", "qwen3", "nemotron"):
        with (
            tempfile.TemporaryDirectory() as folder,
            open(os.devnull, "w") as quiet,
            contextlib.redirect_stderr(quiet),
        ):
            row = compare_step(kind, Path(folder))
        print(
            f"| {row.kind} | {row.loss:.5f} | {row.loss_error:.1e} | {row.gradient_error:.1e} | "
            f"{row.weight_error:.1e} | {row.weights_off:.1e} |"
        )


if __name__ == "__main__":
    main()
