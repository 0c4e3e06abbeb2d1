"""The launch scripts of the examples."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.training.test_cli import ROOT

SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
# srun with two tasks on one machine, scontrol and hayate, as far as the script uses them.
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node-a\\nnode-b\\n"; else echo "scontrol $*"; fi',
    "srun": """shift
for SLURM_PROCID in 0 1; do export SLURM_PROCID SLURM_LOCALID=$SLURM_PROCID; "$@" || code=$?; done
exit ${code:-0}""",
    "hayate": """echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $*"
exit $CODE""",
}


@pytest.mark.parametrize("code", [0, 3, 130])
def test_the_slurm_script_describes_each_process(tmp_path: Path, code: int) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "70007",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "CODE": str(code),
    }
    output = tmp_path / "my run"
    words = ["run.toml", "--data", "a b", "--output", str(output)]
    for resume in ("", " --resume"):
        result = subprocess.run(
            ["bash", SCRIPT, *words], env=environment, capture_output=True, text=True
        )
        assert result.returncode == code, result.stderr
        expected = [
            f"{rank} 2 {rank} 2 node-a 30007: train {' '.join(words)}{resume}" for rank in (0, 1)
        ]
        requeued = ["scontrol requeue 70007"] if code == 130 else []
        assert result.stdout.splitlines() == expected + requeued
        (output / "step-00000002").mkdir(parents=True, exist_ok=True)
