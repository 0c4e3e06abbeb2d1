"""`hayate analyze` on a tiny MiniCPM-V: what it prints where, and how it ends."""

from __future__ import annotations

import io
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hayate import SamplingParams, VisionCore
from hayate.cli import main as cli
from hayate.vision_core import profile as profiles
from tests.cpu.test_cli import assert_fails, run
from tests.vision.checkpoints import write_minicpmv
from tests.vision.photographs import photograph

ROOT = Path(__file__).parents[2]
SIMPLE = ["summary", "objects", "text"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minicpmv")
    write_minicpmv(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, one of them broken and one in a folder below, and a text."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "below").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "below/猫.PNG"):
        blocks = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((100, 80)).save(folder / name)
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "notes.txt").write_text("no image")
    return folder


def analyze(model: Path, *arguments: object) -> Any:
    options = ("--device", "cpu", "--kv-memory", "16M", "--seed", 1, "--max-tokens", 24)
    return run("analyze", "--model", model, *options, *arguments)


def test_many_images_one_broken(model: Path, images: Path) -> None:
    missing = images / "missing.jpg"
    result = analyze(model, missing, images, "--recursive", "--simple", "--json")
    assert result.returncode == 2
    records = [json.loads(line) for line in result.stdout.splitlines()]
    names = ["missing.jpg", "a.jpg", "b.png", "below/猫.PNG"]
    assert [record["image"] for record in records] == [str(images / name) for name in names]
    assert ["error" in record for record in records] == [True, False, True, False]
    assert "does not exist" in records[0]["error"]
    for record in records[1::2]:
        assert list(record) == ["image", "fields", "finish_reason", "timings", "peak_memory"]
        assert list(record["fields"]) == SIMPLE
        assert record["timings"]["num_generated_tokens"] <= 24
    first, *failures = result.stderr.splitlines()
    assert first == "2 of 4 images failed:"
    assert [line.split(": ")[0].strip() for line in failures] == [
        str(missing),
        str(images / "b.png"),
    ]


def test_for_people(model: Path, images: Path) -> None:
    result = analyze(model, images / "a.jpg", "--language", "ja")
    assert result.returncode == 0, result.stderr
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == ["summary", "objects", "text", "mood", "(cut"]
    two = analyze(model, images / "a.jpg", images / "b.png", images / "a.jpg", "--simple")
    assert two.returncode == 2
    block = f"{images / 'a.jpg'}:\n"
    assert two.stdout.count(block) == 2 and two.stdout.startswith(block)
    assert "1 of 3 images failed" in two.stderr and "Traceback" not in two.stderr


def test_a_question(model: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"device": "cpu", "kv_memory": "16M", "seed": 1}
    with VisionCore(model, **options) as core:
        core.sampling = SamplingParams(**{**vars(core.sampling), "max_tokens": 24})
        wanted = core.ask(images / "a.jpg", "What?").text
    ask = ("--ask", "What?")
    assert analyze(model, images / "a.jpg", *ask).stdout == wanted + "\n"
    record = json.loads(analyze(model, images / "a.jpg", *ask, "--json").stdout)
    assert record["text"] == wanted and "fields" not in record
    # On a terminal it comes in pieces.
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    arguments = ["--device", "cpu", "--kv-memory", "16M", "--seed", "1", "--max-tokens", "24"]
    file = str(images / "a.jpg")
    assert cli.main(["analyze", file, *ask, "--model", str(model), *arguments]) == 0
    assert terminal.getvalue().strip() == wanted
    assert terminal.num_writes > 10


class Terminal(io.StringIO):
    num_writes = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.num_writes += 1
        return super().write(text)


def test_interrupted(model: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done is printed, what failed is listed, and nothing else."""
    whole = VisionCore.analyze_simple
    seen = []

    def interrupted(core: VisionCore, image: Any) -> Any:
        seen.append(image)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return whole(core, image)

    monkeypatch.setattr(VisionCore, "analyze_simple", interrupted)
    files = [images / name for name in ("a.jpg", "b.png", "below/猫.PNG", "a.jpg")]
    result = analyze(model, *files, "--simple")
    assert result.returncode == 130 and len(seen) == 3
    assert result.stdout.startswith(f"{images / 'a.jpg'}:") and "猫" not in result.stdout
    lines = result.stderr.splitlines()
    assert lines[0] == "1 of 4 images failed:" and lines[-1] == "hayate: interrupted"
    assert len(lines) == 3


def test_options_that_are_refused(model: Path, images: Path, tmp_path: Path) -> None:
    image = images / "a.jpg"
    assert_fails(analyze(model, image, "--simple", "--ask", "?"), 2, "--simple and --ask")
    assert_fails(analyze(model, image, "--max-side", "0"), 2, "--max-side '0'", "full")
    assert_fails(analyze(model, image, "--max-side", "all"), 2, "--max-side 'all'")
    assert_fails(analyze(model, image, "--language", "fr"), 2, "'fr'", "en, ja")
    assert_fails(analyze(model, image, "--profile", "x.toml"), 2, "--profile x.toml")
    assert_fails(analyze(model, image, "--memory-limit", "100M"), 5, "--memory-limit 100M")
    assert_fails(analyze(model, image, "--temperature", "-1"), 2, "temperature")
    assert_fails(analyze(model, tmp_path), 2, str(tmp_path), "--recursive")
    assert_fails(analyze(model, image, "--device", "x"), 2, "--device 'x'")
    assert_fails(run("analyze", image, "--model", "/nowhere"), 3, "/nowhere")
    no_images = images / "notes.txt"
    assert analyze(model, no_images).returncode == 2  # it was asked for by name


def test_a_photograph(model: Path, tmp_path: Path) -> None:
    """A real picture, in full: 600 x 400 pixels are ten pictures of the tiny model; with a profile of one's own."""
    profile = tmp_path / "colours.toml"
    profile.write_text(
        '[language.en.simple]\ninstruction = "Colours?"\n[language.en.simple.fields]\n'
        'colours = { description = "each", max_items = 2, max_length = 3 }\n'
    )
    options = ("--profile", profile, "--simple", "--json", "--max-side", "full", "-n", 100)
    result = analyze(model, photograph("coffee.png"), *options)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["finish_reason"] == "stop" and list(record["fields"]) == ["colours"]
    assert len(record["fields"]["colours"]) <= 2
    timings = record["timings"]
    assert timings["num_prompt_tokens"] > 10 * (8 + 2)
    assert min(timings[stage] for stage in ("decode", "preprocess", "encode", "prefill")) > 0


def test_the_example(
    model: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = replace(profiles.DEFAULT_SAMPLING, max_tokens=24)
    monkeypatch.setattr(profiles, "DEFAULT_SAMPLING", few)
    script, image = ROOT / "examples/analyze/analyze.py", images / "a.jpg"
    monkeypatch.setattr(sys, "argv", [str(script), str(model), str(image)])
    runpy.run_path(str(script), run_name="__main__")
    output = capsys.readouterr().out
    assert output.startswith(f"{image}: ") and "tokens/s)" in output
    product = ROOT / "examples/analyze/product.toml"
    result = analyze(model, images, "--recursive", "--json", "--profile", product)
    first = json.loads(result.stdout.splitlines()[0])
    assert list(first["fields"]) == ["title", "colours", "condition"]


def test_the_profile_of_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs/vision.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "documented.toml"
    file.write_text(text, encoding="utf-8")
    form = profiles.load_profile(file).wording("en").form("analyze")
    assert [field.name for field in form.fields] == ["summary", "objects"]
    assert all(key in page for key in profiles._SAMPLING_KEYS)
