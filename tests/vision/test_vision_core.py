"""VisionCore on a tiny MiniCPM-V of random weights: what it says is garbage, and all else must hold.

Judged by json.loads and the profile's own lengths, by `LLM.chat` for whole answers, by a loop over logits for the
repetition penalty.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hayate
from hayate import LLM, SamplingParams, VisionCore
from hayate.config import EngineOptions
from hayate.errors import ImageError, ModelError, OutOfMemory, UsageError
from hayate.models import preset_config
from hayate.runtime import device as devices
from hayate.runtime.loading import make_plan
from hayate.vision_core.forms import Field, Form
from hayate.vision_core.profile import DEFAULT_SAMPLING, load_profile
from tests.cpu import test_cli
from tests.vision.checkpoints import write_minicpmv

text_model = test_cli.tiny  # the fixture: a language model
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
# Answers of a random model are of bytes, up to four a character, of which JSON escapes some with twelve characters.
SHORT = """
[sampling]
max_tokens = 400
temperature = 1.5
repetition_penalty = 1.0
[language.en.analyze]
instruction = "Describe it:"
[language.en.analyze.fields]
summary = { description = "what it shows", max_length = 8 }
objects = { description = "things", max_items = 3, max_length = 4 }
[language.ja]
system = "あなたは画像を説明します。"
[language.ja.analyze]
instruction = "説明:"
[language.ja.analyze.fields]
"概要" = { description = "何が写っているか", max_length = 8 }
"物" = { description = "一覧", max_items = 3, max_length = 4 }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minicpmv")
    write_minicpmv(folder)
    return folder


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("profiles") / "short.toml"
    file.write_text(SHORT, encoding="utf-8")
    return file


def open_core(folder: Path, **changes: Any) -> VisionCore:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_memory": "16M", **changes}
    return VisionCore(folder, **options)


@pytest.fixture(scope="module")
def core(folder: Path) -> Iterator[VisionCore]:
    with open_core(folder, sampling=GREEDY) as core:
        yield core


def picture(seed: int, width: int = 100, height: int = 80) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))


# -- answers that parse ----------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "ja"])
def test_garbage_in_fields(folder: Path, profile: Path, language: str) -> None:
    core = open_core(folder, profile=profile, language=language)
    form = core.wording.form("analyze")
    seen = set()
    for seed in range(6):
        core.sampling = SamplingParams(**{**vars(core.sampling), "seed": seed})
        analysis = core.analyze(picture(seed))
        assert analysis.finish_reason == "stop"
        found = json.loads(analysis.text)
        assert list(found) == list(analysis.fields) == [field.name for field in form.fields]
        summary, objects = found.values()
        assert isinstance(summary, str) and len(summary) <= 8
        assert len(objects) <= 3 and all(isinstance(o, str) and len(o) <= 4 for o in objects)
        assert json.dumps(analysis.fields).encode() and analysis[form.fields[0].name] is not None
        for text in [analysis.fields[form.fields[0].name], *analysis[form.fields[1].name]]:
            text.encode()  # characters that can be printed
        seen.add(analysis.text)
    assert len(seen) == 6


def test_an_answer_cut_short(folder: Path) -> None:
    """The built-in profile with fewer tokens than random bytes need."""
    for language, simple in (("en", False), ("ja", True)):
        core = open_core(folder, language=language, seed=3)
        core.sampling = SamplingParams(**{**vars(core.sampling), "max_tokens": 60})
        image = picture(1)
        analysis = core.analyze_simple(image) if simple else core.analyze(image)
        assert analysis.finish_reason == "length"
        assert list(analysis.fields) == ["summary", "objects", "text", *["mood"] * (not simple)]
        assert analysis["summary"] and analysis.text.startswith('{"summary": "')
        assert analysis["objects"] == [] and analysis["text"] == ""


def test_every_beginning_of_an_answer_is_read() -> None:
    fields = (Field("a", "", 20), Field("list", "", 9, 3), Field("z", "", 9), Field("empty", "", 9))
    form = Form("", fields)
    right: dict[str, Any] = {"a": 'q"\\\n猫😀', "list": ["x,]", "}y"], "z": "🐈", "empty": ""}
    assert form.read(json.dumps(right)) == right
    for text in (json.dumps(right), json.dumps(right, ensure_ascii=False)):
        for end in range(len(text)):
            found: dict[str, Any] = form.read(text[:end])
            assert list(found) == list(right)
            for name in ("a", "z"):
                # Half of an escaped pair of surrogates is no character yet.
                assert right[name].startswith(found[name].rstrip("�"))
            whole = found["list"][:-1]
            assert whole == right["list"][: len(whole)]
            for item, truth in zip(found["list"], right["list"], strict=False):
                assert truth.startswith(item)
            if end > text.index('"list": [') + 9:
                assert found["a"] == right["a"]
    for text in ("", "[", "null", "{", '{"b": 1', '{"a": 7, "list": ["x", 3]}'):
        assert form.read(text) == {
            "a": "",
            "list": ["x"] if "x" in text else [],
            "z": "",
            "empty": "",
        }


@pytest.mark.parametrize(("language", "characters"), [("en", 3), ("ja", 1)])
def test_the_built_in_forms_fit_their_tokens(language: str, characters: int) -> None:
    """At `characters` a token, and one for each mark of JSON beside them."""
    profile = load_profile()
    assert DEFAULT_SAMPLING.max_tokens == 512 and profile.sampling == DEFAULT_SAMPLING
    for name, count in (("analyze", 4), ("simple", 3)):
        form = profile.wording(language).form(name)
        assert len(form.fields) == count
        items = [field.max_items or 1 for field in form.fields]
        longest = sum(n * field.max_length for n, field in zip(items, form.fields, strict=True))
        marks = sum(items) + 4 * count
        assert longest / characters + marks <= 512
        assert all(f"- {field.name}: {field.description}" in form.prompt for field in form.fields)


# -- profiles --------------------------------------------------------------------------------------


def test_a_profile_of_ones_own(profile: Path) -> None:
    mine = load_profile(profile)
    assert mine.sampling == SamplingParams(
        temperature=1.5, top_p=0.8, repetition_penalty=1, max_tokens=400
    )
    assert list(mine.wordings) == ["en", "ja"] and mine.wording() is mine.wordings["en"]
    ja = mine.wording("ja")
    messages = ja.messages(["x.png", b"y"], "何?")
    assert messages == [
        {"role": "system", "content": "あなたは画像を説明します。"},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "x.png"},
                {"type": "image", "image": b"y"},
                {"type": "text", "text": "何?"},
            ],
        },
    ]
    assert ja.form("analyze").prompt == "説明:\n- 概要: 何が写っているか\n- 物: 一覧"
    with pytest.raises(UsageError, match=r"language\.ja has no form 'simple'"):
        ja.form("simple")
    with pytest.raises(UsageError, match="no language 'fr'; it has en, ja"):
        mine.wording("fr")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("max_tokens = 400", "max_token = 400", ["sampling.max_token is unknown", "max_tokens"]),
        ("max_tokens = 400", "max_tokens = 0", ["sampling.max_tokens must be", "it is 0"]),
        ("temperature = 1.5", "temperature = -1", ["sampling.temperature must be"]),
        ("max_length = 8", "max_length = 0", ["analyze.fields.summary.max_length", "it is 0"]),
        ("max_length = 8", "max_length = true", ["summary.max_length", "True"]),
        ("max_length = 8", "length = 8", ["summary.max_length is missing"]),
        ("max_items = 3", "items = 3", ["fields.objects.items is unknown", "max_items"]),
        ("max_items = 3", 'max_items = "3"', ["fields.objects.max_items", "'3'"]),
        ('description = "what it shows", ', "", ["summary.description is missing"]),
        ('instruction = "Describe it:"', "", ["language.en.analyze.instruction is missing"]),
        ('"Describe it:"', '""', ["language.en.analyze.instruction", "''"]),
        ("[language.en.analyze]", "[language.en.analyse]", ["en.analyse is unknown", "analyze"]),
        ("[language.en.analyze.fields]", "[language.en.analyze.form]", ["analyze.fields is miss"]),
        ("[sampling]", "[sample]", ["sample is unknown", "sampling"]),
        ("[sampling]", "sampling = 1\n[other]", ["sampling must be a table", "1"]),
        ("[sampling]", "[sampling", ["is not TOML", "line 2"]),
        (SHORT, "", ["language is missing"]),
        (SHORT, 'language = "en"', ["language must be a table"]),
        (SHORT, "[language.en]", ["language.en must be a table that is not empty"]),
        (SHORT, '[language.en]\nsystem = "x"', ["language.en has no form", "analyze or simple"]),
        (SHORT, "[language.en.simple]\ninstruction = 'x'\nfields = {}", ["simple.fields must be"]),
    ],
)
def test_a_wrong_profile_names_the_key(
    tmp_path: Path, old: str, new: str, parts: list[str]
) -> None:
    assert old in SHORT
    file = tmp_path / "wrong.toml"
    file.write_text(SHORT.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_profile(file)
    for part in ["wrong.toml", *parts]:
        assert part in str(caught.value)


def test_profiles_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--profile nowhere: .* one of default"):
        load_profile("nowhere")
    (tmp_path / "x.toml").write_bytes(b"\xff\xff")
    with pytest.raises(UsageError, match="not UTF-8 at byte 0"):
        load_profile(tmp_path / "x.toml")


# -- calls -----------------------------------------------------------------------------------------


def test_answers_are_those_of_the_model(core: VisionCore) -> None:
    small, other = picture(1), picture(2)
    llm = core.load()
    for images in ([small], [small, other]):
        parts = [{"type": "image", "image": image} for image in images]
        content = [*parts, {"type": "text", "text": "What is it?"}]
        truth = llm.chat([{"role": "user", "content": content}], GREEDY)[0].outputs[0].text
        answer = core.ask(images[0] if len(images) == 1 else images, "What is it?")
        assert answer.text == str(answer) == truth.strip()
        assert answer.finish_reason == "length"
        assert "".join(core.stream(images, "What is it?")) == truth
    pieces = core.stream(small, "What is it?")
    next(pieces)
    pieces.close()
    assert not llm.engine.has_work


def test_ways_to_give_an_image(core: VisionCore, tmp_path: Path) -> None:
    image = Image.fromarray(picture(3))
    file = io.BytesIO()
    image.save(file, "PNG")
    path = tmp_path / "写真.png"
    path.write_bytes(file.getvalue())
    texts = {
        core.ask(source, "?").text
        for source in (picture(3), image, file.getvalue(), path, str(path), [path])
    }
    assert len(texts) == 1
    for source, match in [
        ("/nowhere.png", "the image /nowhere.png does not exist"),
        (b"GIF89a", "not an image"),
        ([path, b"x"], "image 2 of 2"),
    ]:
        with pytest.raises(ImageError, match=match):
            core.ask(source, "?")
    with pytest.raises(UsageError, match="list of images is empty"):
        core.analyze([])
    for question in ("", "  ", None):
        with pytest.raises(UsageError, match="question"):
            core.ask(picture(3), question)  # type: ignore[arg-type]


def test_the_longest_side(core: VisionCore, folder: Path) -> None:
    """512 pixels at most, as Pillow makes them; or all of them, in tiles."""
    assert core.max_side == 512
    large = picture(4, 700, 300)
    small = np.asarray(Image.fromarray(large).resize((512, 219), Image.Resampling.BICUBIC))
    assert core.ask(large, "?").text == core.ask(small, "?").text

    def prompt_tokens(max_side: int | None, max_slices: int | None) -> int:
        other = VisionCore(folder, max_side=max_side, max_slices=max_slices, sampling=GREEDY)
        other._llm = core.load()
        return other.ask(picture(4, 600, 600), "?").timings.num_prompt_tokens

    # Eight queries between two tags a tile, a line break after each but the last of the three rows.
    assert prompt_tokens(None, None) - prompt_tokens(None, 1) == 9 * 10 + 2
    assert prompt_tokens(112, None) == prompt_tokens(None, 1)
    for wrong in (0, -1, 1.5, "512"):
        with pytest.raises(UsageError, match="max_side"):
            VisionCore(folder, max_side=wrong)  # type: ignore[arg-type]


def test_timings_and_caches(core: VisionCore) -> None:
    core.clear_cache()
    file = io.BytesIO()
    Image.fromarray(picture(5, 700, 400)).save(file, "JPEG")
    first, second = (core.ask(file.getvalue(), "How many?") for _ in range(2))
    core.clear_cache()
    assert core.load().stats().image_cache_bytes == core.load().stats().num_pages_cached == 0
    third = core.ask(file.getvalue(), "How many?")
    assert first.text == second.text == third.text
    for timings in (first.timings, second.timings, third.timings):
        stages = [timings.decode, timings.preprocess, timings.prefill, timings.generate]
        assert min(stages) > 0
        assert sum(stages) + timings.encode <= timings.total
        # What is left are the objects made on the way; a busy machine may stop the process in between.
        assert timings.total - sum(stages) - timings.encode < 0.5
        assert timings.num_generated_tokens == 12
        assert timings.tokens_per_second == pytest.approx(11 / timings.generate)
    assert second.timings.encode == 0 and second.timings.num_cached_tokens >= 64
    for cold in (first.timings, third.timings):
        assert cold.encode > 0 and cold.num_cached_tokens == 0
    assert third.peak_memory["host"] >= first.peak_memory["host"] > 0


def test_a_seed_repeats_answers(folder: Path, core: VisionCore) -> None:
    def texts(seed: int | None) -> str:
        other = VisionCore(folder, seed=seed)
        other._llm = core.load()
        other.sampling = SamplingParams(**{**vars(other.sampling), "max_tokens": 20})
        return other.ask(picture(6), "?").text

    assert texts(1) == texts(1) != texts(2)


def test_the_repetition_penalty_is_over_the_output(core: VisionCore) -> None:
    """As the model's own code has it: the prompt's tokens are not penalised. A loop over logits is the truth."""
    llm = core.load()
    prompt = list(b"abcdefgh the quick brown fox")
    ids: list[int] = []
    for _ in range(24):
        logits = llm.logits([*prompt, *ids])[-1].clone()
        for token in set(ids):
            logits[token] *= 1 / 1.5 if logits[token] > 0 else 1.5
        ids.append(int(logits.argmax()))
    params = SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=24, ignore_eos=True)
    assert llm.generate(prompt, params)[0].outputs[0].token_ids == ids


# -- the model -------------------------------------------------------------------------------------


def test_nothing_is_loaded_before_it_is_needed(folder: Path) -> None:
    nowhere = VisionCore("/nowhere/model")
    assert not nowhere.loaded
    nowhere.close()
    nowhere.clear_cache()
    with pytest.raises(ModelError, match="/nowhere/model"):
        nowhere.analyze(picture(1))
    with open_core(folder, sampling=GREEDY) as core:
        assert not core.loaded
        first = core.ask(picture(1), "?").text
        assert core.loaded and core.load() is core.load()
        core.close()
        core.close()
        assert not core.loaded
        assert core.ask(picture(1), "?").text == first
    assert not core.loaded
    with pytest.raises(UsageError, match="speed is no option of VisionCore"):
        VisionCore(folder, speed="high")
    assert "VisionCore" in hayate.__all__ and hayate.VisionCore is VisionCore


def test_a_language_model_is_refused(text_model: Path) -> None:
    with pytest.raises(UsageError, match="takes no images"):
        VisionCore(text_model, device="cpu").load()


def test_the_memory_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = open_core(folder, memory_limit="800M", kv_memory=None)
    vague = open_core(folder, memory_limit="much")
    with monkeypatch.context() as patch:
        patch.setattr(LLM, "__init__", lambda *args, **kwargs: pytest.fail("it loads"))
        with pytest.raises(OutOfMemory, match=r"--memory-limit 800M.*the model needs"):
            tight.load()
        with pytest.raises(UsageError, match="--memory-limit"):
            vague.load()
    free = devices.free_bytes(devices.resolve_device("cpu"))
    plans = [
        open_core(folder, memory_limit=limit, kv_memory=None, max_num_seqs=64).load().plan
        for limit in (None, "860M", "847M")  # 832 MiB are set aside for work
    ]
    assert free > 2**31
    assert plans[0].kv_bytes > plans[1].kv_bytes and plans[0].max_model_len == 4096
    assert plans[1].weight_bytes + plans[1].kv_bytes + plans[1].image_cache_bytes < 92 * 2**20
    assert plans[1].max_model_len == 4096 > plans[2].max_model_len >= 1536


def test_the_published_model_fits_seven_gigabytes() -> None:
    config = preset_config("minicpm-v-2.6-int4")
    options = EngineOptions(max_model_len=1536, max_num_seqs=1, image_cache="64M")
    cpu = devices.resolve_device("cpu")
    plan = make_plan(config, options, cpu, free_bytes=7 * 2**30)
    assert plan.kv_tokens >= 1536 and plan.weight_bytes < 6.31e9
    with pytest.raises(OutOfMemory, match="the model needs"):
        make_plan(config, options, cpu, free_bytes=6 * 2**30)
