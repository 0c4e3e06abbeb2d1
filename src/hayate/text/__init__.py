"""Text in and out: the tokenizer, the chat template, and turning token streams into text."""
