"""Training: text to token files, the loss, the optimizer, the loop, and a Hugging Face folder out."""
