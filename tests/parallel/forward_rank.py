"""One rank of a forward pass over several processes: loads its share of each model, writes what it computes.

python -m tests.parallel.forward_rank RANK PORT OUT IDS FOLDER...: ids with commas. First all 4 ranks, then 2 of them.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hayate.config import EngineOptions
from hayate.models.families import load_config
from hayate.runtime.engine import Engine
from hayate.runtime.loading import make_plan
from hayate.runtime.ranks import join, leave
from hayate.runtime.tensor_parallel import Source

SIZES = (4, 2)


def main() -> None:
    rank, port = int(sys.argv[1]), int(sys.argv[2])
    out, ids = Path(sys.argv[3]), [int(i) for i in sys.argv[4].split(",")]
    device = torch.device("cpu")
    store = dist.TCPStore("127.0.0.1", port, max(SIZES), is_master=rank == 0)
    for size in SIZES:
        if rank >= size:
            break
        join(dist.PrefixStore(str(size), store), rank, size, device)
        for folder in map(Path, sys.argv[5:]):
            config = load_config(folder)
            options = EngineOptions(device="cpu", kv_memory=2**22, tensor_parallel=size)
            plan = make_plan(config, options, device)
            model, report = Source(config, folder).load(plan)
            logits = Engine(model, dataclasses.replace(plan)).logits(ids)
            assert report is not None
            owned = sum(p.nbytes for p in model.parameters())
            torch.save((logits, report.num_bytes, owned), out / f"{folder.name}-{size}-{rank}.pt")
        dist.barrier()
        leave(device)
    store.set(f"done {rank}", "")
    if rank == 0:  # which holds the store
        store.wait([f"done {r}" for r in range(max(SIZES))])


if __name__ == "__main__":
    main()
