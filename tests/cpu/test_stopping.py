"""When a sequence ends, against a plain search in the whole text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hayate.runtime import stopping
from hayate.runtime.stopping import StopChecker
from hayate.sampling_params import SamplingParams

EOS = 100


class Pieces:
    """A text stream that knows the text of each token, and has some left for the flush."""

    def __init__(self, pieces: Sequence[str], tail: str = "") -> None:
        self._pieces = list(pieces)
        self._tail = tail

    def push(self, ids: Iterable[int]) -> str:
        return "".join(self._pieces[token_id] for token_id in ids)

    def flush(self) -> str:
        tail, self._tail = self._tail, ""
        return tail


def run(
    params: SamplingParams, pieces: Sequence[str], ids: Sequence[int], tail: str = ""
) -> tuple[list[str], str | None, str | int | None]:
    """(emitted pieces, finish_reason, stop_reason) of tokens `ids`; token i is pieces[i]."""
    checker = StopChecker(params, [EOS], Pieces(pieces, tail))
    emitted = []
    for token_id in ids:
        emission = checker.push(token_id)
        emitted.append(emission.text)
        if emission.finish_reason:
            return emitted, emission.finish_reason, emission.stop_reason
    return [*emitted, checker.finish()], None, None


def naive(
    pieces: Sequence[str], stops: Sequence[str], min_tokens: int
) -> tuple[str, str | None, int]:
    """(text, stop string, tokens used): does a stop string end at this character, or the next?"""
    text = ""
    for number, piece in enumerate(pieces, start=1):
        for char in piece:
            text += char
            ending = [stop for stop in stops if text.endswith(stop)]
            if ending and number >= min_tokens:
                stop = max(ending, key=len)
                return text.removesuffix(stop), stop, number
    return text, None, len(pieces)


TEXT = st.text(alphabet="ab\u3042", max_size=4)
STOPS = st.lists(st.text(alphabet="ab\u3042", min_size=1, max_size=5), max_size=3)


@settings(deadline=None, max_examples=300)
@given(pieces=st.lists(TEXT, min_size=1, max_size=20), stops=STOPS, min_tokens=st.integers(0, 8))
def test_stop_strings_as_a_search_in_the_whole_text(
    pieces: list[str], stops: list[str], min_tokens: int
) -> None:
    params = SamplingParams(stop=stops, min_tokens=min_tokens)
    emitted, reason, stop = run(params, pieces, range(len(pieces)))
    text, expected_stop, num_tokens = naive(pieces, stops, min_tokens)
    assert "".join(emitted) == text
    assert stop == expected_stop
    assert reason == ("stop" if expected_stop else None)
    if expected_stop:
        assert len(emitted) == num_tokens  # it stops at the token that completes the string


@settings(deadline=None, max_examples=300)
@given(pieces=st.lists(TEXT, min_size=1, max_size=20), stops=STOPS)
def test_text_is_held_back_only_while_it_may_become_a_stop_string(
    pieces: list[str], stops: list[str]
) -> None:
    checker = StopChecker(SamplingParams(stop=stops), [], Pieces(pieces))
    text = shown = ""
    for i, piece in enumerate(pieces):
        emission = checker.push(i)
        text += piece
        shown += emission.text
        if emission.finish_reason:
            return
        starts = {stop[:n] for stop in stops for n in range(1, len(stop))}
        longest = max((s for s in starts if text.endswith(s)), key=len, default="")
        assert shown == text.removesuffix(longest)


@settings(deadline=None)
@given(pieces=st.lists(TEXT, min_size=1, max_size=12), stops=STOPS, tail=TEXT)
def test_the_flushed_text_is_searched_too(pieces: list[str], stops: list[str], tail: str) -> None:
    params = SamplingParams(stop=stops, max_tokens=len(pieces))
    emitted, reason, stop = run(params, pieces, range(len(pieces)), tail)
    text, expected_stop, _ = naive([*pieces[:-1], pieces[-1] + tail], stops, 0)
    assert "".join(emitted) == text
    assert (reason, stop) == ("stop" if expected_stop else "length", expected_stop)


def test_end_token() -> None:
    assert run(SamplingParams(), ["a", "b"], [0, 1, EOS]) == (["a", "b", ""], "stop", None)


def test_end_token_is_ignored_when_asked() -> None:
    params = SamplingParams(ignore_eos=True, max_tokens=2)
    checker = StopChecker(params, [0], Pieces(["a", "b"]))
    assert checker.push(0).finish_reason is None
    assert checker.push(1).finish_reason == "length"


def test_stop_token_is_named_and_its_text_is_not_output() -> None:
    params = SamplingParams(stop_token_ids=[1])
    assert run(params, ["a", "b"], [0, 1, 0]) == (["a", ""], "stop", 1)


def test_stop_token_counts_although_the_end_token_is_ignored() -> None:
    params = SamplingParams(stop_token_ids=[EOS], ignore_eos=True)
    assert run(params, ["a"], [0, EOS]) == (["a", ""], "stop", EOS)


def test_held_text_is_released_by_the_end_token() -> None:
    params = SamplingParams(stop="abc")
    assert run(params, ["xab"], [0, EOS]) == (["x", "ab"], "stop", None)


def test_a_stop_string_that_the_flush_completes_counts_before_the_end_token() -> None:
    params = SamplingParams(stop="abc")
    assert run(params, ["xab"], [0, EOS], tail="c") == (["x", ""], "stop", "abc")


def test_max_tokens() -> None:
    assert run(SamplingParams(max_tokens=2), ["a", "b", "c"], [0, 1, 2]) == (
        ["a", "b"],
        "length",
        None,
    )


def test_a_complete_structured_output_ends_with_its_text() -> None:
    """Also when it is the last token of `max_tokens`, and before `min_tokens`; a stop string goes first."""
    for params in (SamplingParams(max_tokens=2, stop=["bc"]), SamplingParams(min_tokens=5)):
        checker = StopChecker(params, [EOS], Pieces(["a", "b"], tail="!"))
        assert checker.push(0).finish_reason is None
        emission = checker.push(1, is_complete=True)
        assert (emission.text, emission.finish_reason, emission.stop_reason) == ("b!", "stop", None)
    checker = StopChecker(SamplingParams(stop=["b"]), [EOS], Pieces(["a", "b"]))
    emission = checker.push(1, is_complete=True)
    assert (emission.text, emission.stop_reason) == ("", "b")


def test_stop_string_at_the_last_token_wins_over_length() -> None:
    params = SamplingParams(max_tokens=2, stop="b")
    assert run(params, ["a", "b"], [0, 1]) == (["a", ""], "stop", "b")


def test_end_and_stop_tokens_do_not_act_before_min_tokens() -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=[1])
    checker = StopChecker(params, [0], Pieces(["a", "b", "c"]))
    assert [checker.push(token_id).finish_reason for token_id in (0, 1, 0)] == [None, None, "stop"]


def test_without_a_tokenizer() -> None:
    checker = StopChecker(SamplingParams(max_tokens=2), [EOS])
    assert checker.push(5).finish_reason is None
    assert checker.push(6).finish_reason == "length"


@pytest.mark.parametrize("stop", ["aab", "abab", "aaaa"])
def test_overlapping_beginnings(stop: str) -> None:
    """Strings whose own beginning repeats: one character at a time, in every position of a text."""
    text = "aabaabababaaaabab"
    pieces = list(text)
    emitted, _, found = run(SamplingParams(stop=stop), pieces, range(len(pieces)))
    assert "".join(emitted) == text[: text.index(stop)]
    assert found == stop


def test_samples_of_a_request_share_their_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limits, 64 strings of 1,024 characters, a table of each for each of 64 samples would take seconds."""
    made = []
    extend = stopping._extend

    def counted(string: str, borders: Sequence[int], length: int, char: str) -> int:
        made.append(char)
        return extend(string, borders, length, char)

    monkeypatch.setattr(stopping, "_extend", counted)
    stopping._borders.cache_clear()
    params = SamplingParams(stop=[chr(ord("A") + i) * 1024 for i in range(64)])
    for _ in range(64):
        StopChecker(params, [EOS])
    assert len(made) == 64 * 1023
