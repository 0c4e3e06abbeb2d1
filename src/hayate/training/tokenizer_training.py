"""`hayate tokenizer train`: byte-level BPE from text (Sennrich et al., arXiv 1508.07909; bytes as in GPT-2).

Any text survives encoding and decoding unchanged: the alphabet is all 256 bytes. Digits are tokens by themselves. The
first ids are <pad>, <s> and </s>, as the `moe` presets have them (bos 1, eos 2).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hayate.errors import UsageError

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(
    texts: Iterable[str], folder: Path, *, vocab_size: int = 32_000, progress: bool = False
) -> int:
    """Train on `texts`, write tokenizer.json and tokenizer_config.json to `folder`; returns the vocabulary's size.

    The size is smaller than asked for when the text has too few pairs to merge. Raises UsageError when `vocab_size`
    has no room for the bytes, or the folder has a tokenizer already.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(
            f"--vocab-size {vocab_size} must be at least {MIN_VOCAB_SIZE}: 256 bytes and 3 special tokens"
        )
    if (folder / "tokenizer.json").exists():
        raise UsageError(f"{folder / 'tokenizer.json'} exists; remove it or name another folder")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()
