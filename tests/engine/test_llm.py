"""LLM end to end on small random models: against transformers' generate, alone and in batches."""

from __future__ import annotations

import json

import pytest
import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers, trainers

import hayate
from hayate import LLM, SamplingParams
from hayate.errors import OutOfMemory, UsageError
from tests.parity import models

TEXT = [
    "The gale blows over the hills.",
    "疾風が丘を越えて吹く。",
    "A 🦊 runs; the sea is grey — déjà vu.",
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def write_tokenizer(folder) -> None:
    """A byte-level BPE of 200 entries, so that every id of the model is a token or unused."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(
    scope="module", params=["llama", "mistral-window", "nemotron", "mixtral", "qwen3-moe"]
)
def pair(request, tmp_path_factory):
    """Our LLM and the transformers model of one architecture, fp32."""
    folder = tmp_path_factory.mktemp(request.param)
    family, fields = models.CASES[request.param]
    models.CASES["engine"] = (family, {**fields, "vocab_size": 320})
    theirs = models.make("engine", folder, dtype=torch.float32)
    write_tokenizer(folder)
    return LLM(folder, device="cpu", kv_memory="16M"), theirs


def their_greedy(model, ids: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([ids]),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def test_greedy_is_transformers_greedy(pair):
    llm, theirs = pair
    for text in TEXT:
        out = llm.generate(text, GREEDY)[0]
        # min_new_tokens keeps transformers from ending; it also bans the end token, so ours may not take it either.
        params = SamplingParams(temperature=0, max_tokens=24, min_tokens=24)
        ours = llm.generate(text, params)[0].outputs[0].token_ids
        assert ours == their_greedy(theirs, out.prompt_token_ids, 24)


def test_batched_equals_alone(pair):
    llm, _ = pair
    alone = [llm.generate(t, GREEDY)[0].outputs[0].token_ids for t in TEXT]
    together = llm.generate(TEXT, GREEDY)
    assert [o.outputs[0].token_ids for o in together] == alone
    assert [o.prompt for o in together] == TEXT


def test_stream_concatenates_to_the_text(pair):
    llm, _ = pair
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=60, ignore_eos=True)
    chunks = list(llm.stream(TEXT[1], params))
    whole = llm.generate(TEXT[1], params)[0].outputs[0]
    assert "".join(c.text for c in chunks) == whole.text
    assert llm.tokenizer.decode(whole.token_ids) == whole.text
    assert [t for c in chunks for t in c.token_ids] == whole.token_ids
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].request.outputs[0].text == whole.text


def test_seed_and_samples(pair):
    llm, _ = pair
    params = SamplingParams(temperature=1.0, seed=11, n=3, max_tokens=12, ignore_eos=True)
    first, again = (llm.generate(TEXT[0], params)[0] for _ in range(2))
    tokens = [o.token_ids for o in first.outputs]
    assert tokens == [o.token_ids for o in again.outputs]
    assert tokens[0] != tokens[1]
    # The same request among others gives the same samples.
    crowd = llm.generate([TEXT[1], TEXT[0], TEXT[2]], params)
    assert [o.token_ids for o in crowd[1].outputs] == tokens


def test_logprobs_are_those_of_the_logits(pair):
    llm, _ = pair
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=4, ignore_eos=True)
    out = llm.generate(TEXT[2], params)[0]
    tokens = out.outputs[0].token_ids
    logits = llm.logits(out.prompt_token_ids + tokens)[len(out.prompt_token_ids) - 1 : -1]
    expected = torch.log_softmax(logits.double(), -1)
    assert len(out.outputs[0].logprobs) == len(tokens)
    for row, token, position in zip(expected, tokens, out.outputs[0].logprobs, strict=True):
        assert position.token.token_id == token
        # fp32 log-softmax of logits of magnitude 10: about 1e-6 of rounding, decode and prefill apart.
        assert position.token.logprob == pytest.approx(row[token].item(), abs=1e-4)
        best = row.topk(4)
        assert [t.token_id for t in position.top] == best.indices.tolist()
        assert [t.logprob for t in position.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_stop_string_and_stop_token(pair):
    llm, _ = pair
    free = llm.generate(TEXT[0], GREEDY)[0].outputs[0]
    token = free.token_ids[5]
    out = llm.generate(
        TEXT[0],
        SamplingParams(temperature=0, max_tokens=24, stop_token_ids=(token,), ignore_eos=True),
    )[0].outputs[0]
    end = free.token_ids.index(token)
    assert out.token_ids == free.token_ids[: end + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", token)
    middle = free.text[3:6]
    out = llm.generate(
        TEXT[0], SamplingParams(temperature=0, max_tokens=24, stop=middle, ignore_eos=True)
    )[0].outputs[0]
    assert out.text == free.text[: free.text.index(middle)]
    assert (out.finish_reason, out.stop_reason) == ("stop", middle)


def test_preemption_changes_nothing(pair):
    """A cache too small for all sequences: some start over, and the text is the same."""
    llm, _ = pair
    prompts = [[3 + (i * 7 + j) % 200 for j in range(20 + 9 * i)] for i in range(5)]
    params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    wide = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    per_token = llm.config.kv_bytes_per_token(4)
    tight = LLM(llm.folder, device="cpu", kv_memory=6 * 64 * per_token)
    narrow = [o.outputs[0].token_ids for o in tight.generate(prompts, params)]
    assert narrow == wide
    assert tight.engine.scheduler.num_preemptions > 0
    assert tight.engine.pages.num_free == tight.plan.num_pages


def test_closing_a_stream_frees_its_pages(pair):
    llm, _ = pair
    stream = llm.stream(TEXT[0], GREEDY)
    next(stream)
    stream.close()
    assert not llm.engine.has_work
    assert llm.engine.pages.num_free == llm.plan.num_pages


def test_wrong_prompts_are_refused(pair):
    llm, _ = pair
    with pytest.raises(UsageError, match="empty"):
        llm.generate([[]], GREEDY)
    with pytest.raises(UsageError, match="320"):
        llm.generate([5, 320], GREEDY)
    with pytest.raises(UsageError, match="300 tokens"):
        llm.generate([[3] * 300], GREEDY)
    with pytest.raises(UsageError, match="logit_bias"):
        llm.generate("a", SamplingParams(temperature=0, logit_bias={400: 1.0}))
    assert not llm.engine.has_work


def test_length_ends_at_the_context(pair):
    llm, _ = pair
    prompt = [3 + i % 200 for i in range(250)]
    out = llm.generate([prompt], SamplingParams(temperature=0, ignore_eos=True))[0].outputs[0]
    assert len(out.token_ids) == llm.plan.max_model_len - 250 == 6
    assert out.finish_reason == "length"


def test_memory_is_checked_before_loading(pair):
    llm, _ = pair
    with pytest.raises(OutOfMemory, match="--kv-memory"):
        LLM(llm.folder, device="cpu", kv_memory=2**50)


def test_package_surface():
    assert set(hayate.__all__) == {
        "LLM",
        "AsyncLLM",
        "SamplingParams",
        "StructuredOutput",
        "VisionCore",
        "__version__",
    }


def test_two_streams_in_turn(pair):
    """Streams advanced in turn, with a whole request between, give what each gives alone."""
    llm, _ = pair
    alone = [llm.generate(t, GREEDY)[0].outputs[0].text for t in TEXT[:2]]
    first, second = (llm.stream(t, GREEDY) for t in TEXT[:2])
    texts = [next(first).text, next(second).text]
    llm.generate(TEXT[2], GREEDY)
    texts[0] += "".join(c.text for c in first)
    rest = list(second)
    texts[1] += "".join(c.text for c in rest)
    assert texts == alone
    assert rest[-1].request is not None


def test_a_failed_step_ends_its_requests_and_no_others(pair, monkeypatch):
    """A step that raises: its requests give what they had; one that waited, and later ones, are whole."""
    llm = LLM.sharing(pair[0], max_num_seqs=1)
    wanted = [llm.generate(t, GREEDY)[0].outputs[0].text for t in TEXT[:2]]
    first, second = (llm.stream(t, GREEDY) for t in TEXT[:2])
    begun = [next(first).text for _ in range(3)]
    assert not llm.engine.submit(waiting := llm.requests.of_prompt(TEXT[1], GREEDY))
    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.sampler, "sample", lambda *_: 1 / 0)
        llm.engine.step()
    with pytest.raises(ZeroDivisionError) as failure:
        begun.extend(c.text for c in first)
    output = failure.value.outputs[0].outputs[0]
    assert (output.finish_reason, len(output.token_ids)) == ("error", 3)
    assert "".join(begun) == output.text
    assert "".join(c.text for c in second) == wanted[1]
    assert waiting.result().outputs[0].text == wanted[1]
    assert llm.generate(TEXT[0], GREEDY)[0].outputs[0].text == wanted[0]
    assert llm.engine.pages.num_free == llm.plan.num_pages
    llm.engine.scheduler.check()


def test_a_broken_sample_fails_alone(pair, monkeypatch):
    """An error while one sample's token becomes text: the other requests of the same step go on."""
    llm, _ = pair
    wanted = [llm.generate(t, GREEDY)[0].outputs[0].text for t in TEXT]
    requests = [llm.requests.of_prompt(t, GREEDY) for t in TEXT]
    monkeypatch.setattr(requests[1].samples[0].stops, "push", lambda *_: 1 / 0)
    for request in requests:
        llm.engine.submit(request)
    while llm.engine.has_work:
        llm.engine.step()
    assert [r.result().outputs[0].text for r in requests] == [wanted[0], "", wanted[2]]
    assert isinstance(requests[1].error, ZeroDivisionError)
    assert llm.engine.pages.num_free == llm.plan.num_pages


@pytest.mark.parametrize("prompt", [[1, "a"], [1.5, 2], [True, 3], None])
def test_prompts_of_wrong_types_are_refused(pair, prompt):
    llm, _ = pair
    with pytest.raises(UsageError, match="prompt"):
        llm.generate([prompt], GREEDY)
