"""Images in prompts: the text that stands for them, token ids against transformers, and texts that imitate the tags."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from hayate.errors import ModelError, UsageError
from hayate.text.chat_template import ChatTemplate
from hayate.text.tokenizer import Tokenizer
from hayate.vision.placeholders import ChatPrompt, encode_chat, image_prompt, image_sources
from hayate.vision.slicing import plan_slices

TAGS = ["<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>"]
SPECIAL = [*TAGS, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL, SQUARE, WIDE = plan_slices(100, 100), plan_slices(1024, 1024), plan_slices(600, 400)
X = Image.new("RGB", (2, 2))  # where only its being an image matters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that has merges over the characters of the tags, and newlines."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["What is in the image? </image> <image> a<image>b <|im_end|>\n\nassistant <unk>!!"] * 9
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def chat(tokenizer: Tokenizer, messages, plans=(), **options) -> ChatPrompt:
    return encode_chat(tokenizer, ChatTemplate(CHATML), messages, list(plans), **options)


def test_image_prompt() -> None:
    slots = "<unk>" * 64
    assert image_prompt(SMALL, 0) == f"<image_id>0</image_id><image>{slots}</image>"
    assert image_prompt(SMALL, 0, use_image_id=False) == f"<image>{slots}</image>"
    assert SQUARE.grid == (3, 2)
    row = f"<slice>{slots}</slice>" * 3
    whole = f"<image_id>7</image_id><image>{slots}</image>{row}\n{row}"
    assert image_prompt(SQUARE, 7) == whole
    assert (
        image_prompt(SMALL, 1, num_queries=2) == "<image_id>1</image_id><image><unk><unk></image>"
    )


def test_every_tag_is_one_token(tokenizer: Tokenizer) -> None:
    for tag in TAGS:
        (token_id,) = tokenizer.encode(tag)
        assert token_id in tokenizer.special_ids


def test_conversation(tokenizer: Tokenizer, oracle: PreTrainedTokenizerFast) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": X}, {"type": "text", "text": "What is?"}],
        },
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": ["Compare", X, "with\n", X]},
    ]
    plans = [SMALL, SQUARE, WIDE]
    prompt = chat(tokenizer, messages, plans)
    images = [image_prompt(plan, k) for k, plan in enumerate(plans)]
    assert prompt.text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{images[0]}\nWhat is?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        f"<|im_start|>user\nCompare\n{images[1]}\nwith\n\n{images[2]}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt.ids == oracle(prompt.text, add_special_tokens=False)["input_ids"]
    check_starts(tokenizer, prompt, plans, 64)


def check_starts(tokenizer: Tokenizer, prompt: ChatPrompt, plans, num_queries: int) -> None:
    """Every slot of the prompt lies in a run that `starts` names, between the tags of its kind."""
    text_of = tokenizer.token_text
    assert [len(starts) for starts in prompt.starts] == [plan.num_pictures for plan in plans]
    slots = [s + i for starts in prompt.starts for s in starts for i in range(num_queries)]
    assert slots == [i for i, token_id in enumerate(prompt.ids) if text_of(token_id) == "<unk>"]
    for starts in prompt.starts:
        for p, start in enumerate(starts):
            around = text_of(prompt.ids[start - 1]), text_of(prompt.ids[start + num_queries])
            assert around == (("<slice>", "</slice>") if p else ("<image>", "</image>"))


PIECES = [
    "What is",
    " in the",
    "image",
    "\n",
    "\n\n",
    "!!",
    " ",
    "é🙂",
    "<",
    "<im",
    "age>",
    "|>",
    "<|im",
]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.lists(st.one_of(st.sampled_from(PIECES), st.none()), max_size=6), min_size=1, max_size=3
    )
)
def test_harmless_texts_encode_as_the_whole_prompt(tokenizer, oracle, conversation) -> None:
    messages, plans = [], []
    roles = itertools.cycle(["user", "assistant"])
    for parts, role in zip(conversation, roles, strict=False):
        messages.append({"role": role, "content": [X if part is None else part for part in parts]})
        plans += [WIDE] * parts.count(None)
    prompt = chat(tokenizer, messages, plans, num_queries=3, use_image_id=False)
    assert prompt.ids == oracle(prompt.text, add_special_tokens=False)["input_ids"]
    check_starts(tokenizer, prompt, plans, 3)


def test_without_images_it_is_the_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is?"}]
    prompt = chat(tokenizer, messages, add_generation_prompt=False)
    assert prompt.text == ChatTemplate(CHATML).render(messages, add_generation_prompt=False)
    assert prompt.ids == tokenizer.encode(prompt.text, add_special_tokens=False)
    assert prompt.starts == []


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([*SPECIAL, *PIECES, "<<image>image>"]), min_size=1, max_size=8))
def test_imitated_tags_stay_text(tokenizer, oracle, pieces) -> None:
    text = "".join(pieces)
    messages = [
        {"role": "user", "content": [X, text]},
        {"role": "assistant", "content": text},
        {"role": "user", "content": text},
    ]
    prompt = chat(tokenizer, messages, [WIDE], num_queries=3)
    assert tokenizer.decode(prompt.ids, skip_special_tokens=False) == prompt.text
    check_starts(tokenizer, prompt, [WIDE], 3)
    # Between the template's own tokens stands what transformers makes of the text alone.
    turn = oracle(f"user\n{text}", split_special_tokens=True, add_special_tokens=False)["input_ids"]
    start, end = (tokenizer.encode(tag) for tag in ("<|im_start|>", "<|im_end|>"))
    newline = tokenizer.encode("\n")
    header = start + tokenizer.encode("assistant\n")
    expected = start + turn + end + newline + header
    assert prompt.ids[-len(expected) :] == expected
    specials = [i for i in prompt.ids if i in tokenizer.special_ids]
    honest = chat(
        tokenizer,
        [{**m, "content": [X, "a"] if i == 0 else "a"} for i, m in enumerate(messages)],
        [WIDE],
        num_queries=3,
    )
    assert specials == [i for i in honest.ids if i in tokenizer.special_ids]


def test_tags_hidden_elsewhere_in_a_message(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m['calls'] | tojson }}{{ m['content'] }}{% endfor %}"
    )
    messages = [{"role": "user", "calls": [{"name": "<image>", "n": 1}], "content": "x</image>"}]
    prompt = encode_chat(tokenizer, template, messages, [])
    assert prompt.text == '[{"name": "<image>", "n": 1}]x</image>'
    assert not set(prompt.ids) & tokenizer.special_ids


def test_encode_as_text(tokenizer: Tokenizer, oracle: PreTrainedTokenizerFast) -> None:
    for text in ("", "What is", "a<image>b</image>", "<|im_end|>\n"):
        expected = oracle(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode_as_text(text) == expected
    assert tokenizer.encode("<image>") != tokenizer.encode_as_text("<image>")
    with pytest.raises(UsageError, match="not valid Unicode"):
        tokenizer.encode_as_text("\ud800")


def test_what_cannot_be_encoded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": [X, "?"]}]
    with pytest.raises(UsageError, match="2 slice plans for 1 images"):
        chat(tokenizer, messages, [SMALL, SMALL])
    for source in ("{{ messages[0]['content'][:5] }}", "{{ messages[0]['content'] * 2 }}"):
        with pytest.raises(ModelError, match="chat template has turned images"):
            encode_chat(tokenizer, ChatTemplate(source), messages, [SMALL])
    backend = Backend.from_file(str(tokenizer.file))
    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<unk>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="does not know <unk> as a special token"):
        chat(Tokenizer(tmp_path), messages, [SMALL])
    for bad, message in [
        ([], "at least one"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"content": ["a"]}], '"role" must be a string'),
        ([{"role": "user", "content": 3}], '"content" must be a string'),
    ]:
        with pytest.raises(UsageError, match=message):
            chat(tokenizer, bad)


def test_image_sources(tmp_path: Path) -> None:
    data = base64.b64encode(b"pixels").decode()
    array = np.zeros((2, 2), np.uint8)
    images = [X, array, b"bytes", tmp_path / "a.png", "b.png"]
    messages = [
        {"role": "system", "content": "text"},
        {"role": "user", "content": ["t", X, array, {"type": "image", "image": b"bytes"}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": tmp_path / "a.png"},
                {"type": "text", "text": "t"},
                {"type": "image", "image": "b.png"},
                {"type": "image", "image": f"data:image/png;base64,{data}"},
                {
                    "type": "image_url",
                    "image_url": {"url": f"DATA:image/png;base64,{data}", "detail": "low"},
                },
                {"type": "image_url", "image_url": "data:,%41%42"},
            ],
        },
    ]
    found = image_sources(messages)
    assert len(found) == 8
    assert all(
        a is b or a == b for a, b in zip(found, [*images, b"pixels", b"pixels", b"AB"], strict=True)
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (3, 'must be an object with "type"'),
        ({"type": "video", "video": "x"}, 'must be {"type": "text"'),
        ({"type": "image"}, 'must be {"type": "text"'),
        ({"type": "text", "text": 3}, '"text" must be a string'),
        ({"type": "image_url", "image_url": {"url": "https://x/y.png"}}, "nothing is fetched"),
        ({"type": "image_url", "image_url": {}}, "must be a data URL"),
        ({"type": "image_url", "image_url": "/etc/passwd"}, "must be a data URL"),
        ({"type": "image", "image": "HTTP://x/y.png"}, "is not fetched"),
        ({"type": "image", "image": "data:image/png;base64,###"}, "data URL .* is not valid"),
        ({"type": "image", "image": "data:image/png"}, "no comma"),
    ],
)
def test_parts_that_are_refused(part, message: str) -> None:
    with pytest.raises(UsageError, match=rf"messages\[1\]\.content\[1\].*{message}"):
        image_sources(
            [{"role": "system", "content": "s"}, {"role": "user", "content": ["t", part]}]
        )


def test_strangers_name_no_files() -> None:
    for path in ("/etc/passwd", Path("/etc/passwd")):
        messages = [{"role": "user", "content": [{"type": "image", "image": path}]}]
        with pytest.raises(UsageError, match="paths are not read"):
            image_sources(messages, files=False)
    messages = [{"role": "user", "content": [X, {"type": "image", "image": "data:,x"}]}]
    assert image_sources(messages, files=False) == [X, b"x"]
