"""How well a model predicts a text: the mean loss a token, and its exponential, the perplexity.

usage: perplexity.py MODEL FILE [TOKENS]
"""

import math
import sys
from pathlib import Path

import torch

from hayate import LLM

model, file, *limit = sys.argv[1:]
llm = LLM(model)
ids = llm.tokenizer.encode(Path(file).read_text(encoding="utf-8"))
ids = ids[: int(limit[0]) if limit else 1024]

# Row t of the logits predicts token t + 1.
logits = llm.logits(ids)[:-1]
loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
print(f"{len(ids) - 1} predictions, mean loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
