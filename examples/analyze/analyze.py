"""Describe images, and ask about them: the arguments are a model (folder or hub id) and images."""

import sys

from hayate import VisionCore

model, *images = sys.argv[1:]
with VisionCore(model) as core:
    for image in images:
        analysis = core.analyze(image)
        print(f"{image}: {analysis['summary']}")
        for thing in analysis["objects"]:
            print(f"- {thing}")
        print(core.ask(image, "What is the main colour?"))
        timings = analysis.timings
        print(f"({timings.total:.2f} s, {timings.tokens_per_second:.0f} tokens/s)\n")
