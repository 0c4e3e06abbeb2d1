"""Text to token files to batches: against json, pyarrow, the safetensors library and a naive loop."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hayate.errors import ModelError, UsageError
from hayate.training.documents import find_files, read_documents
from hayate.training.prepare import prepare
from hayate.training.token_file import TokenFile, TokenFileWriter
from hayate.training.token_stream import IGNORE, TokenStream
from hayate.training.tokenizer_training import train_tokenizer

TEXTS = [
    "Call me Ishmael.",
    "疾風 is a strong wind.\n\nIt blows.",
    "x" * 500,
    "1234 + 5678 = 6912 🙂",
]
EOS = 2


def write_tokens(path: Path, documents: list[list[int]], vocab_size: int = 1000) -> TokenFile:
    with TokenFileWriter(path, vocab_size=vocab_size, eos_token_id=EOS, tokenizer="t") as writer:
        for document in documents:
            writer.add(document)
    return TokenFile.open(path)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS * 3, folder, vocab_size=400)
    return folder


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_token_file_is_read_back_and_is_safetensors(
    tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    documents = [[5, 6, 7], [vocab_size - 1], list(range(100))]
    file = write_tokens(tmp_path / "a.safetensors", documents, vocab_size)
    assert file.tokens.dtype == dtype
    assert [file.document(i).tolist() for i in range(3)] == [[*d, EOS] for d in documents]
    from safetensors.numpy import load_file

    loaded = load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(loaded["tokens"], file.tokens)
    np.testing.assert_array_equal(loaded["document_ends"], file.document_ends)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="token id 1000 is outside"):
        write_tokens(tmp_path / "a.safetensors", [[1], [1000]])
    assert list(tmp_path.iterdir()) == []


def test_damaged_token_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tokens(path, [[1, 2, 3]])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=r"a\.safetensors"):
        TokenFile.open(path)
    damaged = bytearray(whole)
    damaged[-8:] = (3).to_bytes(8, "little")  # the last document ends before the last token
    path.write_bytes(damaged)
    with pytest.raises(ModelError, match="documents do not cover its tokens"):
        TokenFile.open(path)
    from safetensors.numpy import save_file

    save_file({"tokens": np.zeros(3, np.uint16)}, path)
    with pytest.raises(ModelError, match="is not a token file"):
        TokenFile.open(path)


def test_every_kind_of_file_gives_its_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [json.dumps({"text": t, "id": i}, ensure_ascii=False) for i, t in enumerate(TEXTS)]
    (tmp_path / "a.txt").write_text(TEXTS[1], encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    table = pyarrow.table({"id": range(4), "text": TEXTS})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=3)
    with pyarrow.ipc.new_stream(tmp_path / "e.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    with pyarrow.ipc.new_file(tmp_path / "f.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "other.bin").write_bytes(b"\0")
    files = find_files([tmp_path])
    assert [f.name for f in files] == [
        "a.txt",
        "b.jsonl",
        "c.jsonl.gz",
        "d.parquet",
        "e.arrow",
        "f.arrow",
    ]
    assert list(read_documents(files[0])) == [TEXTS[1]]
    for file in files[1:]:
        assert list(read_documents(file)) == TEXTS, file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff", r"a.txt is not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": }\n', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', r"a.jsonl:1 has no field 'text', it has 'body'"),
        ("a.jsonl", b'{"text": 5}\n', r"a.jsonl:1: field 'text' is int"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1 holds list, not an object"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9], r"not a whole gzip file"),
        ("a.parquet", b"PAR1 nonsense", r"a.parquet cannot be read"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(read_documents(tmp_path / name))


def test_missing_and_unknown_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing.txt does not exist"):
        find_files([tmp_path / "nothing.txt"])
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(UsageError, match=r"a.pdf is of a kind that is not read"):
        find_files([tmp_path / "a.pdf"])
    with pytest.raises(UsageError, match=r"holds no file that ends in"):
        find_files([tmp_path])


def test_trained_tokenizer_keeps_any_text(tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for text in [*TEXTS, "never seen: ÿ \x00 \U0010ffff Ω≈ç√"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("2048")["input_ids"]) == 4, "digits are tokens by themselves"


def test_prepare_keeps_every_document_once(tmp_path: Path, tokenizer_folder: Path) -> None:
    from tokenizers import Tokenizer

    texts = [f"document {i}: {TEXTS[i % 4]}" for i in range(400)]
    rows = [json.dumps({"text": t}) for t in [*texts, ""]]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    report = prepare([tmp_path / "a.jsonl"], tokenizer_folder, tmp_path / "out", held_out=0.1)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    files = [TokenFile.open(tmp_path / "out" / f"{n}.safetensors") for n in ("train", "validation")]
    found = [
        tokenizer.decode(f.document(i)[:-1].tolist()) for f in files for i in range(f.num_documents)
    ]
    assert sorted(found) == sorted(texts)
    assert (report.num_documents, report.num_empty) == (401, 1)
    assert files[0].num_tokens == report.num_train_tokens
    # Binomial(400, 0.1): outside 15..70 has a probability below 1e-4; the hash is fixed, so it never flickers.
    assert 15 <= files[1].num_documents <= 70
    random.Random(0).shuffle(rows)
    (tmp_path / "b.jsonl").write_text("\n".join(rows[:250]), encoding="utf-8")
    prepare([tmp_path / "b.jsonl"], tokenizer_folder, tmp_path / "again", held_out=0.1)
    again = TokenFile.open(tmp_path / "again" / "validation.safetensors")
    held_out = {files[1].document(i).tobytes() for i in range(files[1].num_documents)}
    assert {again.document(i).tobytes() for i in range(again.num_documents)} <= held_out


def test_a_failed_prepare_leaves_no_token_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbad\n')
    with pytest.raises(UsageError, match=r"a.jsonl:2"):
        prepare([tmp_path / "a.jsonl"], tokenizer_folder, tmp_path / "out", held_out=0)
    assert not list((tmp_path / "out").glob("*"))


def naive_window(file: TokenFile, window: int, L: int) -> tuple[list, list, list]:
    """What a window must hold, token by token."""
    document_of = [i for i in range(file.num_documents) for _ in file.document(i)]
    begin = window * L
    token_ids = file.tokens[begin : begin + L].tolist()
    targets, starts = [], []
    for p in range(begin, begin + L):
        same = document_of[p] == document_of[p + 1]
        targets.append(int(file.tokens[p + 1]) if same else IGNORE)
        starts.append(
            next(q for q in range(begin, p + 1) if document_of[q] == document_of[p]) - begin
        )
    return token_ids, targets, starts


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    sequence_length=st.integers(1, 24),
)
def test_windows_equal_the_naive_ones(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int
) -> None:
    generator = random.Random(str(lengths))
    documents = [[generator.randrange(3, 1000) for _ in range(n)] for n in lengths]
    file = write_tokens(tmp_path_factory.mktemp("tokens") / "a.safetensors", documents)
    if file.num_tokens <= sequence_length:
        with pytest.raises(UsageError, match="less than a sequence"):
            TokenStream([file], sequence_length=sequence_length)
        return
    stream = TokenStream([file], sequence_length=sequence_length, shuffle=False)
    for window in range(stream.num_sequences):
        batch = stream.batch(window, 1)
        expected = naive_window(file, window, sequence_length)
        assert (
            batch.token_ids[0].tolist(),
            batch.targets[0].tolist(),
            batch.document_starts[0].tolist(),
        ) == expected


def two_sources(tmp_path: Path) -> list[TokenFile]:
    return [
        write_tokens(tmp_path / f"{n}.safetensors", [[100 * n + 3 + i] * 15 for i in range(n * 20)])
        for n in (1, 3)
    ]


def test_each_epoch_shows_every_window_once_in_a_new_order(tmp_path: Path) -> None:
    file = two_sources(tmp_path)[0]
    stream = TokenStream([file], sequence_length=16, seed=7)
    n = stream.num_sequences
    epochs = [[tuple(stream.batch(e * n + i, 1).token_ids[0]) for i in range(n)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == n
    assert epochs[0] != epochs[1]
    other = TokenStream([file], sequence_length=16, seed=8)
    assert [tuple(other.batch(i, 1).token_ids[0]) for i in range(n)] != epochs[0]


def test_a_step_does_not_depend_on_history_or_on_the_number_of_processes(tmp_path: Path) -> None:
    files = two_sources(tmp_path)

    def new() -> TokenStream:
        return TokenStream(files, sequence_length=16, weights=[2, 1], seed=3)

    straight = new()
    batches = [straight.batch(step, 12) for step in range(40)]
    for step in (39, 0, 17, 18, 5):
        alone = new().batch(step, 12)
        np.testing.assert_array_equal(alone.token_ids, batches[step].token_ids)
        np.testing.assert_array_equal(alone.targets, batches[step].targets)
    for num_ranks in (2, 3, 4):
        parts = [new().batch(17, 12, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
        joined = np.concatenate([p.token_ids for p in parts])
        np.testing.assert_array_equal(joined, batches[17].token_ids)


def test_sources_are_drawn_by_weight(tmp_path: Path) -> None:
    files = two_sources(tmp_path)
    stream = TokenStream(files, sequence_length=16, weights=[3, 1], seed=0)
    token_ids = np.concatenate([stream.batch(step, 100).token_ids for step in range(20)])
    share = float((token_ids[:, 0] < 200).mean())
    # 2,000 draws with probability 0.75: the standard deviation of the share is 0.0097.
    assert abs(share - 0.75) < 5 * 0.0097


def test_sources_must_fit_together(tmp_path: Path) -> None:
    files = two_sources(tmp_path)
    with pytest.raises(UsageError, match="data weights"):
        TokenStream(files, sequence_length=16, weights=[1, 0])
    with TokenFileWriter(
        tmp_path / "c.safetensors", vocab_size=1000, eos_token_id=EOS, tokenizer="other"
    ) as writer:
        writer.add(list(range(3, 50)))
    with pytest.raises(UsageError, match="different tokenizers"):
        TokenStream([*files, TokenFile.open(tmp_path / "c.safetensors")], sequence_length=16)
