"""The command line `hayate`: one file a verb. Verbs import torch only when they run, never for
help."""
