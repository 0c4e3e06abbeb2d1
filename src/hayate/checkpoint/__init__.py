"""Checkpoint folders as Hugging Face publishes them: found, validated, read, written.

`index` finds the files, `header` validates each, `placements` says which tensor fills what,
`reader` moves the bytes, `writer` goes backwards. `header`, `index` and `config_json` do without
torch.
"""
