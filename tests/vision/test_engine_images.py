"""Images through the engine: every token is that of a plain forward pass with the pictures spliced in.

The truth is transformers' Qwen2 over embeddings joined here, from the checkpoint's tensors; what the encoder makes of
a picture is taken from our model (tests/vision/test_minicpmv_model.py judges it), one image at a time. fp32
throughout, so that rounding hides nothing.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hayate import LLM, AsyncLLM, SamplingParams, StructuredOutput
from hayate.errors import ImageError, ModelError, OutOfMemory, UsageError
from hayate.runtime.outputs import RequestOutput
from hayate.runtime.page_allocator import PageAllocator
from hayate.runtime.request import Request
from hayate.runtime.sequence import ImageSpan
from hayate.runtime.sequence import Sequence as TokenSequence
from hayate.vision.image import preprocess
from tests.engine import crowd
from tests.engine.test_llm import write_tokenizer as write_text_tokenizer
from tests.engine.tiny import tiny
from tests.parity import models
from tests.vision.checkpoints import UNK_ID, tiny_config, write_minicpmv

QUERIES = 24  # tokens of a picture: spans that begin and end anywhere in pages and chunks
SMALL = 100, 80  # one picture
LARGE = 300, 200  # seven
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def picture(seed: int, size: tuple[int, int] = SMALL) -> np.ndarray:
    """Coloured blocks, (height, width, 3)."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST))


def ask(*parts: Any, role: str = "user") -> dict[str, Any]:
    named = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p}
        for p in parts
    ]
    return {"role": role, "content": named}


CHATS: list[list[dict[str, Any]]] = [
    [ask(picture(1), "What is it?")],
    [ask("Compare", picture(2, LARGE), "with", picture(3), "please.")],
    [ask(picture(4), "One?"), {"role": "assistant", "content": "Yes."}, ask(picture(5), "Two?")],
    [{"role": "user", "content": "No pictures here, but some more words than that."}],
    [{"role": "system", "content": "Be brief."}, ask(picture(6, (80, 100)), picture(1), "Which?")],
]


class Truth:
    """Greedy tokens by a full forward pass for each."""

    def __init__(self, weights: dict[str, torch.Tensor], llm: LLM) -> None:
        names = (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_theta"),
            *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"),
        )
        fields = {name: tiny_config()[name] for name in names}
        self.model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**fields)).eval()
        prefix = "llm."
        self.model.load_state_dict(
            {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}
        )
        self.llm = llm

    @torch.inference_mode()
    def embedded(self, request: Request) -> torch.Tensor:
        """The embeddings (1, T, D) of a prompt: at its <unk> tokens, in order, those of the pictures."""
        x = self.model.get_input_embeddings()(torch.tensor(request.prompt_ids))
        places = [i for i, token_id in enumerate(request.prompt_ids) if token_id == UNK_ID]
        rows = []
        for image in request.images:
            given = image.image
            pictures = preprocess(given.pixels, given.plan, torch.device("cpu"), torch.float32)
            network: Any = self.llm.engine.runner.model
            rows.append(network.encode(pictures.patches, pictures.sizes).flatten(0, 1))
        if places:
            x[places] = torch.cat(rows)
        return x[None]

    @torch.inference_mode()
    def tokens(
        self, request: Request, count: int, allowed: Sequence[int] | None = None
    ) -> list[int]:
        """allowed: the only tokens to choose from."""
        x, tokens = self.embedded(request), []
        for _ in range(count):
            logits = self.model(inputs_embeds=x).logits[0, -1]
            if allowed is not None:
                logits = logits + torch.full_like(logits, -torch.inf).index_fill_(
                    0, torch.tensor(allowed), 0.0
                )
            tokens.append(int(logits.argmax()))
            new = self.model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
            x = torch.cat([x, new], dim=1)
        return tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("minicpmv")


@pytest.fixture(scope="module")
def weights(folder: Any) -> dict[str, torch.Tensor]:
    return write_minicpmv(folder, query_num=QUERIES)


@pytest.fixture(scope="module")
def llm(folder: Any, weights: Any) -> LLM:
    return LLM(folder, device="cpu", dtype="float32", kv_memory="32M", max_model_len=1024)


@pytest.fixture(scope="module")
def truth(weights: dict[str, torch.Tensor], llm: LLM) -> Truth:
    return Truth(weights, llm)


@pytest.fixture(scope="module")
def wanted(truth: Truth) -> list[list[int]]:
    """The right answers to CHATS."""
    return [truth.tokens(truth.llm.requests.of_messages(chat), 12) for chat in CHATS]


def tokens(outputs: list[RequestOutput]) -> list[int]:
    (output,) = outputs[0].outputs
    return output.token_ids


def run(llm: LLM, requests: Sequence[Request]) -> None:
    """Submit all; the engine stays sound throughout, and gives everything back."""
    for request in requests:
        llm.engine.submit(request)
    while llm.engine.has_work:
        llm.engine.step()
        llm.engine.scheduler.check()
        assert llm.stats().image_cache_bytes <= llm.plan.image_cache_bytes
    assert llm.engine.pages.num_free == llm.plan.num_pages
    for request in requests:
        assert not request.images and not any(s.sequence.spans for s in request.samples)
    assert not any(e.users for e in llm.engine.images._encoded.values())


def always_guess(llm: LLM) -> list[list[int]]:
    """Verify drafts at every step, whether it pays or not; returns what will be proposed."""
    assert llm.engine.speculation is not None
    speculator: Any = llm.engine.speculation.speculator
    speculator.wants = bool
    speculator._choose = lambda sequences, limits: speculator.draft_sizes[-1]
    proposed: list[list[int]] = []
    propose = speculator.proposer.propose

    def watched(*args: Any) -> list[list[int]]:
        found = propose(*args)
        proposed.extend(found)
        return found

    speculator.proposer.propose = watched
    return proposed


def answers(requests: Sequence[Request]) -> list[list[int]]:
    assert [r.error for r in requests] == [None] * len(requests)
    return [r.samples[0].output.token_ids for r in requests]


class Encodings:
    """Counts what a model encodes: `batches` are the numbers of pictures of each call."""

    def __init__(self, llm: LLM, patch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        network: Any = llm.engine.runner.model
        self._encode = network.encode
        patch.setattr(network, "encode", self)

    def __call__(self, patches: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        self.batches.append(len(sizes))
        return self._encode(patches, sizes)


# -- the same tokens, however they are computed ----------------------------------------------------


def test_tokens_are_those_of_a_plain_forward(llm: LLM, wanted: list[list[int]]) -> None:
    for chat, right in zip(CHATS, wanted, strict=True):
        (output,) = llm.chat(chat, GREEDY)
        assert output.outputs[0].token_ids == right
        num_pictures = output.prompt_token_ids.count(UNK_ID) / QUERIES
        assert num_pictures == output.prompt.count("<image>") + output.prompt.count("<slice>")
        assert output.metrics.num_prompt_tokens == len(output.prompt_token_ids)
    assert len({tuple(t) for t in wanted}) == len(wanted)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_chunks_cut_pictures_anywhere(
    llm: LLM, wanted: list[list[int]], prefix_cache: bool
) -> None:
    """Chunks of at most 64 tokens, some fewer beside sequences that decode, all prompts at once."""
    chunked = LLM.sharing(
        llm, max_num_batched_tokens=64, max_chunk_tokens=64, prefix_cache=prefix_cache
    )
    requests = [chunked.requests.of_messages(chat, GREEDY) for chat in CHATS]
    spans = [(span, r) for r in requests for i in r.images for span in i.spans]
    cut = set()
    launch = chunked.engine.runner.launch

    def watched(step: Any, **options: Any) -> Any:
        for sequence, count in zip(step.sequences, step.num_tokens, strict=True):
            end = sequence.num_computed + count
            cut.update(
                s for s, r in spans if r.samples[0].sequence is sequence and s.start < end < s.end
            )
        return launch(step, **options)

    chunked.engine.runner.launch = watched
    run(chunked, requests)
    assert answers(requests) == wanted
    assert len(cut) >= 3


def test_a_conversation_goes_on_from_the_cache(llm: LLM, truth: Truth) -> None:
    cached = LLM.sharing(llm)
    first = [ask(picture(2, LARGE), "What do you see?")]
    said = cached.chat(first, GREEDY)[0].outputs[0].text
    second = [*first, {"role": "assistant", "content": said}, ask(picture(7), "And here?")]
    request = cached.requests.of_messages(second, GREEDY)
    right = truth.tokens(request, 12)
    assert right == truth.tokens(cached.requests.of_messages(second), 12)
    run(cached, [request])
    assert answers([request]) == [right]
    assert request.result().metrics.num_cached_tokens >= 7 * QUERIES
    # The same again is in the cache to its last full page.
    again = cached.chat(second, GREEDY)[0]
    assert again.outputs[0].token_ids == right
    assert again.metrics.num_cached_tokens == (len(again.prompt_token_ids) - 1) // 64 * 64


def test_equal_ids_of_different_pictures_share_nothing(llm: LLM, truth: Truth) -> None:
    """Of the same size, so that the prompts are equal, id for id; an equal picture before them is shared."""
    cached = LLM.sharing(llm)
    chats = [[ask(picture(1, LARGE), picture(s, LARGE), "Which?")] for s in (8, 9)]
    chats.append([ask(picture(9, LARGE), picture(1, LARGE), "Which?")])
    requests = [cached.requests.of_messages(chat, GREEDY) for chat in chats]
    right = [truth.tokens(r, 12) for r in requests]
    assert requests[0].prompt_ids == requests[1].prompt_ids == requests[2].prompt_ids
    starts = [span.start for image in requests[0].images for span in image.spans]
    assert len({tuple(t) for t in right}) == 3
    for request in requests:
        run(cached, [request])
    assert answers(requests) == right
    found = [r.result().metrics.num_cached_tokens for r in requests]
    # To the last page that begins before the second image's first picture; to that of the first image's.
    assert found == [0, starts[7] // 64 * 64, starts[0] // 64 * 64]


def test_preemption_computes_pictures_anew(llm: LLM) -> None:
    """A cache too small for all: some start over, prompt and output, without the prefix cache's help."""
    params = dataclasses.replace(GREEDY, max_tokens=100)
    chats = [[ask(picture(20 + i), f"{i}?", picture(30 + i))] for i in range(5)]
    wide = LLM.sharing(llm)
    requests = [wide.requests.of_messages(chat, params) for chat in chats]
    run(wide, requests)
    per_page = 64 * llm.config.kv_bytes_per_token(4)
    tight = LLM.sharing(llm, kv_memory=11 * per_page, max_model_len=None, prefix_cache=False)
    others = [tight.requests.of_messages(chat, params) for chat in chats]
    run(tight, others)
    assert answers(others) == answers(requests)
    assert tight.stats().num_preemptions > 0


def test_drafts_change_nothing(llm: LLM, wanted: list[list[int]]) -> None:
    """Known answers with mistakes as drafts, so that there are verify steps beside chunks of pictures."""
    drafted = LLM.sharing(llm, max_chunk_tokens=64)
    rng = random.Random(3)
    plain = [drafted.requests.of_messages(chat, GREEDY) for chat in CHATS]
    run(drafted, plain)
    again = [drafted.requests.of_messages(chat, GREEDY) for chat in CHATS]
    for one, other in zip(plain, again, strict=True):
        other.samples[0].sequence.seed = one.samples[0].sequence.seed
    speculator = crowd.KnownAnswers(rng)
    speculator.install(drafted, plain)
    crowd.run(drafted, again, rng)
    assert answers(again) == wanted
    assert speculator.stats.acceptance_rate > 0.5


def test_ngram_guesses_of_placeholders_are_rejected(llm: LLM) -> None:
    """The text ends as the prompt does before an image: look-up proposes the image's <unk> tokens."""
    chat = [ask("Look here:", picture(1), "And?")]
    bias = {llm.tokenizer.backend.token_to_id(c): 100.0 for c in (":", "Ċ")}  # "Ċ" is a newline
    params = dataclasses.replace(GREEDY, max_tokens=40, logit_bias=bias)
    guessing = LLM.sharing(llm, speculative="ngram")
    proposed = always_guess(guessing)
    assert tokens(guessing.chat(chat, params)) == tokens(llm.chat(chat, params))
    assert any(UNK_ID in ids for ids in proposed)
    assert guessing.stats().num_verify_steps > 0


def test_a_draft_model_guesses_nothing_of_what_it_cannot_see(
    folder: Any, llm: LLM, wanted: list[list[int]]
) -> None:
    drafting = LLM(folder, device="cpu", dtype="float32", kv_memory="32M", speculative=str(folder))
    always_guess(drafting)
    assert tokens(drafting.chat(CHATS[0], GREEDY)) == wanted[0]
    assert drafting.stats().num_draft_tokens == 0
    assert tokens(drafting.chat(CHATS[3], GREEDY)) == wanted[3]
    assert drafting.stats().num_draft_tokens > 0


def test_structured_output(llm: LLM, truth: Truth) -> None:
    structured = StructuredOutput.regex("[a-e]{8}")
    params = dataclasses.replace(GREEDY, structured=structured, ignore_eos=False)
    request = llm.requests.of_messages(CHATS[1], params)
    letters = [llm.tokenizer.backend.token_to_id(c) for c in "abcde"]  # type: ignore[union-attr]
    right = truth.tokens(request, 8, letters)
    (output,) = llm.chat(CHATS[1], params)
    assert re.fullmatch("[a-e]{8}", output.outputs[0].text)
    assert output.outputs[0].token_ids[:8] == right


def test_samples_of_one_prompt_share_its_pictures(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    encodings = Encodings(llm, monkeypatch)
    params = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=12, ignore_eos=True)
    sampled = LLM.sharing(llm)
    together = sampled.chat(CHATS[1], params)[0].outputs
    assert encodings.batches == [8]
    alone = LLM.sharing(llm, prefix_cache=False, max_num_seqs=1)
    assert [o.token_ids for o in together] == [
        o.token_ids for o in alone.chat(CHATS[1], params)[0].outputs
    ]
    assert len({tuple(o.token_ids) for o in together}) == 3


def test_batch_invariant_mode(
    llm: LLM, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is encoded by itself, whatever other images the prompt has."""
    encodings = Encodings(llm, monkeypatch)
    invariant = LLM.sharing(llm, batch_invariant=True)
    assert tokens(invariant.chat(CHATS[1], GREEDY)) == wanted[1]
    assert encodings.batches == [7, 1]


# -- encoding --------------------------------------------------------------------------------------


def test_an_image_is_encoded_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seeing = LLM.sharing(llm)
    encodings = Encodings(seeing, monkeypatch)
    chat = [ask(picture(1), picture(1), "Are they alike?")]
    first = seeing.chat(chat, GREEDY)[0]
    assert encodings.batches == [1]
    second = seeing.chat([ask(picture(1), "And again?", picture(2))], GREEDY)[0]
    assert encodings.batches == [1, 1]
    third = seeing.chat(chat, GREEDY)[0]
    assert third.outputs[0].token_ids == first.outputs[0].token_ids
    stats = seeing.stats()
    assert (stats.num_images, stats.num_images_found) == (6, 4)
    assert stats.image_cache_bytes == 2 * QUERIES * llm.config.hidden_size * 4
    assert min(first.metrics.image_preprocess_time, first.metrics.image_encode_time) > 0
    assert second.metrics.image_encode_time > 0
    assert (third.metrics.image_preprocess_time, third.metrics.image_encode_time) == (0, 0)
    for metrics in (first.metrics, third.metrics):
        parts = (metrics.image_open_time, metrics.image_preprocess_time, metrics.image_encode_time)
        assert 0 < sum(parts) < metrics.time_to_first_token
    text = seeing.chat(CHATS[3], GREEDY)[0].metrics
    assert text.image_open_time == text.image_preprocess_time == text.image_encode_time == 0
    # Cut otherwise it is another image.
    seeing.chat([ask(picture(2, LARGE), "?")], GREEDY)
    seeing.chat([ask(picture(2, LARGE), "?")], GREEDY, max_slices=4)
    assert encodings.batches == [1, 1, 7, 5]


def test_steps_go_on_between_batches_of_pictures(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten pictures a step at most; a sequence that decodes gets a token between two batches."""
    seeing = LLM.sharing(llm)
    encodings = Encodings(seeing, monkeypatch)
    text = seeing.requests.of_messages(CHATS[3], GREEDY)
    images = [picture(40 + i) for i in range(9)]
    shown = seeing.requests.of_messages(
        [ask(*images, picture(50, LARGE), picture(51, LARGE), picture(40), "?")], GREEDY
    )
    seeing.engine.submit(text)
    seeing.engine.step()
    seeing.engine.submit(shown)
    assert seeing.stats().num_waiting == 1
    seen = []
    while seeing.engine.has_work:
        seeing.engine.step()
        seen.append((list(encodings.batches), len(text.samples[0].output.token_ids)))
    assert encodings.batches == [9, 7, 7]
    assert [n for batches, n in seen if batches and len(batches) < 3] == [2, 3]
    assert answers([shown, text])[0] == tokens(
        llm.chat([ask(*images, picture(50, LARGE), picture(51, LARGE), picture(40), "?")], GREEDY)
    )


def test_the_most_urgent_is_encoded_first(llm: LLM) -> None:
    seeing = LLM.sharing(llm, max_num_seqs=1)
    requests = [
        seeing.requests.of_messages([ask(picture(60 + p), "?")], GREEDY, priority=p)
        for p in (3, 1, 2)
    ]
    for request in requests:
        seeing.engine.submit(request)
    order = []
    while seeing.engine.has_work:
        order += [r.priority for r, chunk in seeing.engine.step() if chunk.request is not None]
    assert order == [1, 2, 3]


def test_embeddings_stay_within_their_memory(
    llm: LLM, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for eight pictures: requests wait for others to end, and images long unused are dropped."""
    one = QUERIES * llm.config.hidden_size * 4
    seeing = LLM.sharing(llm, image_cache=8 * one)
    encodings = Encodings(seeing, monkeypatch)
    requests = [seeing.requests.of_messages(chat, GREEDY) for chat in CHATS * 2]
    run(seeing, requests)
    assert answers(requests) == wanted * 2
    assert seeing.stats().image_cache_bytes <= 8 * one
    before = sum(encodings.batches)
    seeing.chat(CHATS[1], GREEDY)
    seeing.chat(CHATS[0], GREEDY)
    seeing.chat(CHATS[1], GREEDY)
    assert sum(encodings.batches) > before + 8
    with pytest.raises(OutOfMemory, match="--image-cache"):
        seeing.chat([ask(picture(1), picture(2), picture(3, LARGE), "?")], GREEDY)
    assert not seeing.engine.has_work


def test_two_requests_that_fit_one_at_a_time(llm: LLM) -> None:
    """The more urgent comes when the other has been begun; neither waits for what the other holds."""
    seeing = LLM.sharing(llm, image_cache=21 * QUERIES * llm.config.hidden_size * 4)
    big, urgent = (
        seeing.requests.of_messages([ask(*map(picture, numbers))], GREEDY, priority=priority)
        for numbers, priority in [(range(100, 115), 1), (range(120, 132), 0)]
    )
    seeing.engine.submit(big)
    seeing.engine.step()
    assert big.images[9].is_encoded and not big.images[10].is_encoded
    seeing.engine.submit(urgent)
    for _ in range(100):
        seeing.engine.step()
    assert [r.finished for r in (big, urgent)] == [True, True]


# -- ending early, and failure -----------------------------------------------------------------------


def test_a_failed_encoding_fails_its_request_alone(
    llm: LLM, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeing = LLM.sharing(llm)
    network: Any = seeing.engine.runner.model
    encode = network.encode

    def failing(patches: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        if len(sizes) == 8:
            raise ZeroDivisionError("eight")
        return encode(patches, sizes)

    monkeypatch.setattr(network, "encode", failing)
    requests = [seeing.requests.of_messages(chat, GREEDY) for chat in CHATS]
    run(seeing, requests)
    assert [type(r.error) for r in requests] == [type(None), ZeroDivisionError, *[type(None)] * 3]
    assert requests[1].samples[0].output.finish_reason == "error"
    del requests[1]
    assert answers(requests) == wanted[:1] + wanted[2:]
    with pytest.raises(ZeroDivisionError):
        seeing.chat(CHATS[1], GREEDY)


def test_ending_before_and_while_encoding(llm: LLM, wanted: list[list[int]]) -> None:
    seeing = LLM.sharing(llm)
    images = [picture(70 + i) for i in range(20)]
    aborted, late, begun, whole = (
        seeing.requests.of_messages(chat, GREEDY, timeout=timeout)
        for chat, timeout in [
            (CHATS[0], None),
            (CHATS[2], 0.001),
            ([ask(*images)], None),
            (CHATS[1], None),
        ]
    )
    time.sleep(0.002)
    for request in (aborted, late, begun, whole):
        seeing.engine.submit(request)
    seeing.engine.abort(aborted)
    seeing.engine.step()  # ends `late`, and encodes the first ten images of `begun`
    assert begun.images[0].is_encoded and not begun.images[19].is_encoded
    seeing.engine.abort(begun)
    run(seeing, [])
    assert answers([whole]) == [wanted[1]]
    assert [r.samples[0].output.finish_reason for r in (aborted, late, begun)] == [
        "abort",
        "timeout",
        "abort",
    ]
    assert seeing.stats().num_waiting == 0


def test_not_finite_embeddings_are_not_kept(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seeing = LLM.sharing(llm)
    network: Any = seeing.engine.runner.model
    encode = network.encode
    with monkeypatch.context() as patched:
        patched.setattr(network, "encode", lambda *args: encode(*args) * torch.nan)
        with pytest.raises(ModelError, match="not finite"):
            seeing.chat(CHATS[0], GREEDY)
    assert tokens(seeing.chat(CHATS[0], GREEDY)) == tokens(llm.chat(CHATS[0], GREEDY))


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        ({"type": "image", "image": b"no image"}, ImageError, "image 1 of 1"),
        ({"type": "image", "image": "/nowhere/x.png"}, ImageError, "/nowhere/x.png"),
        (
            {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}},
            UsageError,
            "data URL",
        ),
        ({"type": "audio", "audio": b""}, UsageError, r"messages\[0\]\.content\[0\]"),
    ],
)
def test_bad_parts_are_refused(llm: LLM, part: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        llm.chat([{"role": "user", "content": [part]}], GREEDY)
    assert not llm.engine.has_work


@pytest.mark.parametrize("messages", [None, [], "text", [None], [{"role": "user"}]])
def test_malformed_messages_are_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(UsageError, match="messages"):
        llm.chat(messages, GREEDY)


def test_images_that_do_not_fit_the_context(llm: LLM) -> None:
    with pytest.raises(UsageError, match=r"the first 7 of 9 images take 1176 tokens"):
        llm.chat([ask(*(picture(i, LARGE) for i in range(9)))], GREEDY)
    with pytest.raises(UsageError, match="max_slices"):
        llm.chat(CHATS[1], GREEDY, max_slices=0)


def test_a_language_model_takes_no_images(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family, fields = models.CASES["llama"]
    monkeypatch.setitem(models.CASES, "text", (family, {**fields, "vocab_size": 320}))
    models.make("text", tmp_path, dtype=torch.float32)
    write_text_tokenizer(tmp_path)
    llm = LLM(tmp_path, device="cpu", kv_memory="4M")
    with pytest.raises(UsageError, match=f"{tmp_path} is a language model and takes no images"):
        llm.chat(CHATS[0], GREEDY)
    with pytest.raises(UsageError, match="takes no images"):
        llm.chat(CHATS[3], GREEDY, max_slices=1)
    with pytest.raises(UsageError, match="--image-cache"):
        tiny(LLM, image_cache="1M")
    parts = llm.requests.of_messages([ask("The gale", "blows.")])
    assert (
        parts.prompt_ids
        == llm.requests.of_messages([{"role": "user", "content": "The gale\nblows."}]).prompt_ids
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_slice_nums", 4), ("norm_mean", [0.4, 0.5, 0.5]), ("version", 2.5), ("resample", 2)],
)
def test_preprocessor_config_must_agree(tmp_path: Any, field: str, value: Any) -> None:
    write_minicpmv(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(ModelError, match=rf"preprocessor_config.json: {field} is"):
        LLM(tmp_path, device="cpu", kv_memory="4M")


# -- callers -----------------------------------------------------------------------------------------


def test_ways_to_give_an_image(llm: LLM, wanted: list[list[int]], tmp_path: Any) -> None:
    image = Image.fromarray(picture(1))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": source}
        for source in (image, buffer.getvalue(), tmp_path / "x.png", str(tmp_path / "x.png"))
    ]
    for part in [*parts, {"type": "image_url", "image_url": {"url": url}}]:
        chat = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
        assert tokens(llm.chat(chat, GREEDY)) == wanted[0]


def test_a_conversation_is_a_prompt(llm: LLM, wanted: list[list[int]]) -> None:
    prompts = [llm.requests.read(chat) for chat in CHATS[:2]]
    for _ in range(2):
        found = llm.generate([*prompts, prompts[0]], GREEDY)
        assert [o.outputs[0].token_ids for o in found] == [*wanted[:2], wanted[0]]
    chunks = list(llm.stream(prompts[1], GREEDY))
    assert [t for c in chunks for t in c.token_ids] == wanted[1]


def test_streams(llm: LLM, wanted: list[list[int]]) -> None:
    for chat, right in zip(CHATS, wanted, strict=True):
        chunks = list(llm.stream_chat(chat, GREEDY))
        assert [t for c in chunks for t in c.token_ids] == right
        last = chunks[-1].request
        assert last is not None and last.outputs[0].text == "".join(c.text for c in chunks)
    stream = llm.stream_chat(CHATS[1], GREEDY)
    next(stream)
    stream.close()
    assert not llm.engine.has_work and llm.engine.pages.num_free == llm.plan.num_pages


@pytest.fixture
def crowded(llm: LLM) -> Iterator[AsyncLLM]:
    many = AsyncLLM.sharing(llm, max_chunk_tokens=64, max_num_seqs=6)
    yield many
    many._thread.close(drain=False)
    many._thread.join()


def test_many_callers(crowded: AsyncLLM, wanted: list[list[int]]) -> None:
    async def stream(chat: Any) -> list[int]:
        return [t async for c in crowded.stream_chat(chat, GREEDY) for t in c.token_ids]

    async def main() -> None:
        whole = [crowded.chat(chat, GREEDY) for chat in CHATS * 3]
        streams = [stream(chat) for chat in CHATS * 3]
        bad = crowded.chat([ask(b"no image")], GREEDY)
        *found, failed = await asyncio.gather(*whole, *streams, bad, return_exceptions=True)
        assert [tokens(o) for o in found[:15]] == wanted * 3
        assert found[15:] == wanted * 3
        assert isinstance(failed, ImageError)
        # Cancelled while its images wait.
        task = asyncio.create_task(crowded.chat([ask(*(picture(80 + i) for i in range(20)))]))
        while not crowded.stats().num_waiting:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while crowded.engine.has_work:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(main(), timeout=120))
    stats = crowded.stats()
    assert stats.num_images_found >= stats.num_images - 20 - 6
    assert (stats.num_waiting, stats.num_running, stats.num_pages_used) == (0, 0, 0)
    assert not any(e.users for e in crowded.engine.images._encoded.values())


# -- keys of pages -----------------------------------------------------------------------------------


def test_pages_match_exactly_when_ids_and_pictures_do() -> None:
    """Random prompts of few ids and pictures, against a comparison of what each position shows."""
    rng = random.Random(0)
    pages = PageAllocator(4000, 4)
    known: set[tuple] = set()
    shared = 0
    for _ in range(600):
        length = rng.randrange(5, 20)
        ids = [rng.randrange(2) if rng.random() < 0.02 else 7 for _ in range(length)]
        spans, at = [], rng.choice((0, 3))
        while (end := at + rng.choice((2, 5))) < length:
            spans.append(ImageSpan(at, end, bytes([rng.random() < 0.2]) * 32, rng.random() < 0.2))
            at = end + rng.choice((0, 0, 0, 1))
        shows: list[Any] = [(token_id,) for token_id in ids]
        for span in spans:
            for i in range(span.start, span.end):
                shows[i] = (ids[i], span.digest, span.index, i - span.start)
        sequence = TokenSequence(ids, GREEDY, 100, 0, spans=spans)
        found = pages.reuse(sequence)
        longest = max(
            (n for n in range(0, length, 4) if tuple(shows[:n]) in known or n == 0), default=0
        )
        assert found == longest
        shared += found > 4
        assert pages.extend(sequence, length)
        pages.publish(sequence, length)
        known |= {tuple(shows[:n]) for n in range(4, length + 1, 4)}
        pages.release(sequence)
    assert shared > 100
