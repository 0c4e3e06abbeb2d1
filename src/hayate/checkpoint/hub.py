"""Model names -> a local folder: an existing folder, a built-in name, or a Hugging Face hub id."""

from __future__ import annotations

import re
from pathlib import Path

from hayate.checkpoint import smollm2
from hayate.errors import ModelError, UsageError

BUILT_IN = {smollm2.NAME: smollm2.pull_smollm2}

# What a decoder needs from a repository; weights in other formats and in subfolders stay there.
_ALLOW = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
]
_IGNORE = ["consolidated*", "*/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(name: str | Path, revision: str | None = None, progress: bool = True) -> Path:
    """The folder of model `name`, fetched first when it is a built-in name or a hub id not yet in
    the cache.

    Tried in this order: an existing folder, a name in `BUILT_IN`, a hub id `org/name` (at
    `revision`: branch, tag or commit). The hub's own variables are honoured: HF_HOME, HF_TOKEN,
    HF_HUB_OFFLINE, HF_ENDPOINT. progress: draw bars on standard error. Raises ModelError (what
    was tried, what to do), UsageError for a revision of something local.
    """
    text = str(name)
    path = Path(text or " ").expanduser()  # Path("") would be the current folder
    if path.is_dir() or text in BUILT_IN:
        if revision is not None:
            raise UsageError(
                f"--revision {revision!r} applies to hub ids only, and {text!r} is local; leave "
                f"it out"
            )
        return _checked(path) if path.is_dir() else BUILT_IN[text](progress)
    if path.exists():
        raise ModelError(
            f"{text} is a file; --model takes the folder that holds config.json and *.safetensors"
        )
    if not _HUB_ID.fullmatch(text):
        names = ", ".join(BUILT_IN)
        raise ModelError(
            f"no such folder: {text!r}; --model takes a folder, a hub id `org/name`, or a "
            f"built-in name ({names})"
        )
    return _from_hub(text, revision, progress)


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: config.json is missing; is this the folder of a Hugging Face model?"
        )
    return folder


def _from_hub(repo_id: str, revision: str | None, progress: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    if not progress:
        disable_progress_bars()
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=_ALLOW, ignore_patterns=_IGNORE
        )
    except Exception as error:  # whatever the network libraries raise, it means "not fetched"
        raise ModelError(_explain(error, repo_id, revision)) from error
    if not any(Path(folder).glob("*.safetensors")):
        raise ModelError(
            f"{repo_id} on the hub has no *.safetensors files; hayate reads no other weight format"
        )
    return _checked(Path(folder))


def _explain(error: Exception, repo_id: str, revision: str | None) -> str:
    """One sentence: what the hub answered, what was tried before, what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated: accept its licence at {hub}/{repo_id}, then set HF_TOKEN to a "
            f"token of that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"model {repo_id!r} not found: no folder of that name here and no such repository on "
            f"{hub}; check the spelling, or set HF_TOKEN if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repo_id} on {hub} has no revision {revision!r}; give --revision a branch, tag or "
            f"commit of it"
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"model {repo_id!r} not found: no folder of that name, and not (or not whole) in the "
            f"hub cache {cache}; HF_HUB_OFFLINE is set, unset it to download"
        )
    if isinstance(error, LocalEntryNotFoundError) or "connect" in type(error).__name__.lower():
        return (
            f"model {repo_id!r} not found: no folder of that name, not in the hub cache {cache}, "
            f"and {hub} cannot be reached; check the network or give a folder"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot store {repo_id} in {cache}: {error}; free space or set HF_HOME"
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return (
        f"cannot fetch {repo_id} from {hub}: {type(error).__name__}: {reason}; try again, or give "
        f"a folder"
    )
