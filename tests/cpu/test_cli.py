"""The command line: what it prints where, and every exit code it can end with."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hayate import errors
from hayate.cli import main as cli

VOCAB, D, F, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 300, 32, 48, 4, 2, 8, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "eos_token_id": 257,
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": draw(VOCAB, D), "model.norm.weight": draw(D) + 1}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.input_layernorm.weight": draw(D) + 1,
            f"{name}.post_attention_layernorm.weight": draw(D) + 1,
            f"{name}.self_attn.q_proj.weight": draw(HEADS * HEAD_DIM, D),
            f"{name}.self_attn.k_proj.weight": draw(KV_HEADS * HEAD_DIM, D),
            f"{name}.self_attn.v_proj.weight": draw(KV_HEADS * HEAD_DIM, D),
            f"{name}.self_attn.o_proj.weight": draw(D, HEADS * HEAD_DIM),
            f"{name}.mlp.gate_proj.weight": draw(F, D),
            f"{name}.mlp.up_proj.weight": draw(F, D),
            f"{name}.mlp.down_proj.weight": draw(D, F),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE})
    )
    return folder


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model for a test to break."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hayate", *map(str, arguments)]


def real(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The same in this process, where torch is imported already: much faster."""
    output, error = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(error),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        code = cli.main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), error.getvalue())


def with_prompt(model: Path, *arguments: object) -> tuple[object, ...]:
    return ("generate", "--model", model, "--prompt", "Hi", "--device", "cpu", *arguments)


def generate(model: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run(*with_prompt(model, *arguments))


def assert_fails(result: subprocess.CompletedProcess[str], code: int, *parts: object) -> None:
    """One line on standard error that holds all `parts`, nothing on standard output."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("hayate: error: ")
    for part in parts:
        assert str(part) in lines[0]


# -- exit code 0 -----------------------------------------------------------------------------------


def test_text_on_stdout_and_figures_on_stderr(tiny: Path) -> None:
    streamed = real(*with_prompt(tiny, "--max-tokens", 12))
    whole = generate(tiny, "--max-tokens", 12, "--no-stream")
    assert streamed.returncode == whole.returncode == 0, streamed.stderr
    assert streamed.stdout == whole.stdout
    names = [line.split()[0] for line in streamed.stderr.strip().splitlines()]
    assert names == ["load", "prompt", "generated", "peak"]
    assert "12 tokens" in streamed.stderr
    assert "tokens/s" in streamed.stderr


def test_json_is_one_object(tiny: Path) -> None:
    result = generate(tiny, "--json", "--max-tokens", 5, "--logprobs", 2, "--n", 2, "--seed", 1)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["prompt"] == "Hi"
    assert len(report["prompt_token_ids"]) == 2
    assert [sample["index"] for sample in report["outputs"]] == [0, 1]
    for sample in report["outputs"]:
        assert len(sample["token_ids"]) == len(sample["logprobs"])
        assert all(len(position["top"]) == 2 for position in sample["logprobs"])
    figures = report["figures"]
    assert figures["prompt_tokens"] == 2
    assert figures["load_bytes"] == (tiny / "model.safetensors").stat().st_size - header_bytes(tiny)
    assert figures["peak_host_bytes"] > 2**20
    assert figures["peak_gpu_bytes"] is None


def header_bytes(folder: Path) -> int:
    with (folder / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_prompt_file_and_stdin_are_read_exactly(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("日本語\n".encode())
    common = ("generate", "--model", tiny, "--device", "cpu", "--json", "--max-tokens", 1)
    from_file = json.loads(run(*common, "--prompt-file", file).stdout)
    from_stdin = json.loads(run(*common, "--prompt-file", "-", stdin="日本語\n").stdout)
    assert from_file["prompt"] == from_stdin["prompt"] == "日本語\n"
    assert len(from_file["prompt_token_ids"]) == 10  # three bytes a character, and the line's end


def test_raw_by_default_and_template_with_chat(tiny: Path) -> None:
    arguments = ("--json", "--max-tokens", 1)
    assert json.loads(generate(tiny, *arguments).stdout)["prompt"] == "Hi"
    chat = json.loads(generate(tiny, *arguments, "--chat", "--system", "Be brief.").stdout)
    assert chat["prompt"] == "<system>Be brief.\n<user>Hi\n<assistant>"


def test_sampling_options_reach_the_model(tiny: Path) -> None:
    def ids(*arguments: object) -> list[list[int]]:
        result = generate(tiny, "--json", "--max-tokens", 8, *arguments)
        assert result.returncode == 0, result.stderr
        return [sample["token_ids"] for sample in json.loads(result.stdout)["outputs"]]

    greedy = ids()
    forced = ids("--logit-bias", "65=100", "--repetition-penalty", "1", "--min-p", "0.1")
    assert forced == [[65] * 8]
    hot = ("--temperature", 5, "--top-k", 200, "--top-p", 0.99, "--seed", 7)
    assert ids(*hot) == ids(*hot) != greedy
    first = greedy[0][0]
    assert ids("--stop-token-id", first)[0] == [first]
    assert len(ids("--stop-token-id", first, "--min-tokens", 3)[0]) >= 3
    assert len(ids("--n", 3)) == 3


def test_samples_are_separated(tiny: Path) -> None:
    result = generate(tiny, "--n", 2, "--max-tokens", 3)
    assert result.stdout.startswith("--- sample 1 ---\n")
    assert "\n--- sample 2 ---\n" in result.stdout


def test_a_reader_that_has_enough(tiny: Path) -> None:
    """`hayate generate | head -c 1` ends quietly."""
    arguments = ("generate", "--model", tiny, "--device", "cpu", "--prompt", "Hi", "--ignore-eos")
    process = subprocess.Popen(
        command(*arguments, "--max-tokens", 3000), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


def test_inspect(tiny: Path) -> None:
    text = run("inspect", tiny)
    assert text.returncode == 0, text.stderr
    assert "LlamaForCausalLM" in text.stdout
    report = json.loads(run("inspect", tiny, "--json").stdout)
    count = VOCAB * D + D + LAYERS * (2 * D + 3 * F * D + 2 * HEAD_DIM * (HEADS + KV_HEADS) * D)
    assert report["parameters"] == report["active_parameters"] == count
    assert report["bytes"] == 4 * count
    assert report["bytes_by_dtype"] == {"F32": 4 * count}
    assert report["kv_bytes_per_token"] == 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
    assert report["files"] == ["model.safetensors"]
    cpu = report["devices"][-1]
    assert cpu["device"] == "cpu"
    assert cpu["fits"]
    assert cpu["context"] == 4096
    assert cpu["kv_tokens"] * report["kv_bytes_per_token"] <= cpu["free_bytes"]


def test_inspect_says_what_does_not_fit(broken: Path) -> None:
    """Only config.json decides what fits: one that claims 10^13 parameters fits nowhere."""
    config = CONFIG | {"intermediate_size": 10**11}
    (broken / "config.json").write_text(json.dumps(config))
    device = json.loads(run("inspect", broken, "--json").stdout)["devices"][-1]
    assert not device["fits"]
    assert "needs" in device["reason"]


def test_env() -> None:
    report = json.loads(run("env", "--json").stdout)
    assert report["packages"]["torch"] == torch.__version__
    assert report["devices"][-1]["name"] == "cpu"
    assert report["devices"][-1]["free_bytes"] <= report["devices"][-1]["total_bytes"]
    text = run("env")
    assert text.returncode == 0
    assert torch.__version__ in text.stdout


def test_pull_of_a_folder_prints_it(tiny: Path) -> None:
    result = run("pull", tiny)
    assert (result.returncode, result.stdout) == (0, f"{tiny}\n")


# -- chat ------------------------------------------------------------------------------------------


def chat(model: Path, lines: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    arguments = ("--model", model, "--device", "cpu", "--max-tokens", 4, *arguments)
    return run("chat", *arguments, stdin=lines)


def test_chat_from_a_pipe(tiny: Path) -> None:
    """Every line that is not empty or a command is answered, until /exit."""
    force = ("--logit-bias", "65=100")  # the same answer to everything
    result = chat(tiny, "one\n\ntwo\n/reset\nthree\n/exit\nnever\n", *force)
    assert result.returncode == 0, result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == 3
    assert len(set(answers)) == 1
    assert result.stderr == ""


def test_chat_remembers_until_reset(tiny: Path) -> None:
    def answers(lines: str) -> str:
        result = chat(tiny, lines)
        assert result.returncode == 0, result.stderr
        return result.stdout

    first, alone = answers("before\n"), answers("question\n")
    assert answers("before\n/reset\nquestion\n") == first + alone
    assert answers("before\nquestion\n") != first + alone
    assert answers("/system Other words.\nquestion\n") != alone


def test_chat_commands(tiny: Path) -> None:
    result = chat(tiny, "/help\n/what\n")
    assert result.returncode == 0
    assert result.stdout == ""
    assert "/reset" in result.stderr
    assert "/what is no command" in result.stderr


def test_chat_survives_a_full_context(tiny: Path) -> None:
    result = chat(tiny, "x" * 100 + "\nshort\n", "--max-model-len", 64)
    assert result.returncode == 0, result.stderr
    assert "/reset" in result.stderr
    assert len(result.stdout) > 0, "the next message is answered"


# -- exit code 2: wrong usage ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--max-tokens", 0), ("max_tokens", "at least 1", "0")),
        (("--max-tokens", "many"), ("--max-tokens", "integer")),
        (("--temperature", -1), ("temperature", "-1")),
        (("--top-p", 1.5), ("top_p", "1.5")),
        (("--logit-bias", "x=1"), ("--logit-bias", "'x=1'")),
        (("--device", "tpu"), ("--device", "'tpu'")),
        (("--dtype", "int3"), ("--dtype", "'int3'")),
        (("--kv-memory", "lots"), ("--kv-memory", "'lots'")),
        (("--no-such-option",), ("--no-such-option", "hayate generate --help")),
        (("--logprobs", 1), ("--logprobs", "--json")),
        (("--system", "x"), ("--system", "--chat")),
        (("--revision", "main"), ("--revision", "'main'")),
        (("--prompt-file", "x"), ("--prompt", "--prompt-file")),
        (("--regex", "a", "--json-object"), ("--json-object and --regex", "one of them")),
        (("--regex", "a(b"), ("structured", "a(b", "unclosed group")),
        (("--json-schema", "{"), ("json_schema", "not valid JSON")),
        (("--json-schema", "none.json"), ("--json-schema none.json", "No such file")),
        (("--grammar", "none.lark"), ("--grammar none.lark", "No such file")),
        (("--choice", ""), ("choice", "''")),
        (("--stop", ""), ("stop",)),
        (("--logit-bias", "300=1"), ("logit_bias", "300")),
        (("--max-model-len", 2), ("2 tokens", "--max-model-len")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_wrong_usage(tiny: Path, arguments: tuple, parts: tuple) -> None:
    assert_fails(generate(tiny, *arguments), 2, *parts)


def test_structured_output(tiny: Path, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text(
        '{"const": {"é": [1]}, "x-guidance": {"whitespace_flexible": false}}', encoding="utf-8"
    )
    grammar.write_text('start: "a" B\nB: "é" | "bc"', encoding="utf-8")
    object_schema = '{"type": "object", "properties": {}, "additionalProperties": false}'
    for arguments, pattern in (
        (("--choice", "yes", "--choice", "né"), "yes|né"),
        (("--regex", "[ab]{3}é"), "[ab]{3}é"),
        (("--json-schema", schema), re.escape('{"é":[1]}')),
        (("--json-schema", object_schema), r"\{\s*\}"),
        (("--grammar", grammar), "a(é|bc)"),
    ):
        result = generate(tiny, "--temperature", 1, "--seed", 3, *arguments)
        assert result.returncode == 0, result.stderr
        assert re.fullmatch(pattern, result.stdout.removesuffix("\n"))


def test_a_json_object(tiny: Path) -> None:
    """The bias is on the byte `}`: random weights would not close the object soon."""
    bias = ("--logit-bias", f"{sorted(pre_tokenizers.ByteLevel.alphabet()).index('}')}=100")
    result = generate(tiny, "--json-object", *bias)
    assert json.loads(result.stdout) == {}, result.stderr


def test_prompt_file_that_is_not_utf8(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"caf\xe9")
    result = run("generate", "--model", tiny, "--prompt-file", file)
    assert_fails(result, 2, file, "not UTF-8", "0xe9 at offset 3")
    missing = run("generate", "--model", tiny, "--prompt-file", tmp_path / "none.txt")
    assert_fails(missing, 2, "none.txt", "No such file")


def test_prompt_that_is_not_utf8(tiny: Path) -> None:
    arguments: list[Any] = [*command("generate", "--model", tiny, "--prompt"), b"caf\xe9"]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert_fails(result, 2, "--prompt is not UTF-8", "character 3")


def test_empty_prompt(tiny: Path) -> None:
    assert_fails(run("generate", "--model", tiny, "--prompt", "", "--device", "cpu"), 2, "empty")


def test_usage_of_other_verbs(tiny: Path) -> None:
    assert_fails(run("nonsense"), 2, "nonsense", "hayate --help")
    assert_fails(run("inspect"), 2, "Missing argument")
    assert_fails(run("bench", "decode"), 2, "--model", "--preset")
    assert_fails(run("bench", "load", "--model", tiny, "--batch", 2), 2, "--batch", "bench load")
    assert_fails(run("bench", "decode", "--preset", "minitron-8b"), 2, "--random-weights")
    bare = run()
    assert bare.returncode == 2
    assert "Usage" in bare.stdout + bare.stderr


# -- exit code 3: the model ------------------------------------------------------------------------


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(CONFIG | fields))

    return edit


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def name_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (shutil.rmtree, ("no such folder",)),
        (remove("config.json"), ("config.json is missing",)),
        (remove("tokenizer.json"), ("tokenizer.json is missing",)),
        (remove("model.safetensors"), ("no weights", "model.safetensors")),
        (name_a_missing_shard, ("model-00002-of-00002.safetensors",)),
        (rewrite("model.safetensors", lambda b: b[:-100]), ("model.safetensors",)),
        (rewrite("model.safetensors", lambda b: b"\xff" * 8 + b[8:]), ("model.safetensors",)),
        (rewrite("config.json", lambda b: b[:-9]), ("config.json",)),
        (rewrite("tokenizer.json", lambda b: b[:-9]), ("tokenizer.json",)),
        (edit_config(architectures=["MambaForCausalLM"]), ("MambaForCausalLM", "LlamaForCausalLM")),
        (edit_config(hidden_act="gelu"), ("hidden_act", "gelu")),
        (edit_config(num_hidden_layers=3), ("model.layers.2.",)),
        (edit_config(intermediate_size=64), ("mlp", "48")),
    ],
    ids=[
        "no folder",
        "no config.json",
        "no tokenizer.json",
        "no weights",
        "no shard",
        "truncated",
        "corrupt header",
        "corrupt config",
        "corrupt tokenizer",
        "unknown architecture",
        "unknown activation",
        "tensor missing",
        "wrong shape",
    ],
)
def test_model_not_valid(broken: Path, damage: Callable[[Path], None], parts: tuple) -> None:
    damage(broken)
    assert_fails(generate(broken), 3, *parts)


def test_inspect_of_no_folder() -> None:
    assert_fails(run("inspect", "./nothing"), 3, "./nothing")


# -- exit codes 4, 5, 6, 1, 130 --------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "1"])
def test_device_not_available(tiny: Path, device: str) -> None:
    result = run("generate", "--model", tiny, "--prompt", "Hi", "--device", device)
    assert_fails(result, 4, "CUDA is not available: ", "--device cpu")


def test_exit_codes_of_the_real_command(tiny: Path) -> None:
    """A process ends with what `main` returns, which the other tests check."""
    assert_fails(real(*with_prompt(tiny / "nothing")), 3, "no such folder")
    assert_fails(real(*with_prompt(tiny, "--kv-memory", "900T")), 5, "--kv-memory")


def test_out_of_memory_is_found_before_loading(tiny: Path, broken: Path) -> None:
    assert_fails(generate(tiny, "--kv-memory", "900T"), 5, "--kv-memory 900T", "free")
    edit_config(intermediate_size=10**11)(broken)
    assert_fails(generate(broken), 5, "needs", "free")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            errors.GpuFault("kernel x failed;\nrestart"),
            6,
            "hayate: error: kernel x failed; restart",
        ),
        (
            KeyError("oops"),
            1,
            "hayate: internal error: KeyError: 'oops'; run with --verbose for the traceback",
        ),
        (KeyboardInterrupt(), 130, "hayate: interrupted"),
    ],
    ids=["GPU fault", "defect", "interrupt"],
)
def test_failures_that_have_no_command(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hayate.checkpoint import hub

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "resolve_model", fail)
    assert cli.main(["pull", "x"]) == code
    assert capsys.readouterr().err == line + "\n"
    if code != 130:
        assert cli.main(["pull", "x", "--verbose"]) == code
        report = capsys.readouterr().err
        assert report.startswith("Traceback")
        assert "--verbose" not in report.splitlines()[-1]


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_interrupt_while_generating(tiny: Path, verb: str) -> None:
    """Ctrl-C ends `generate` with one line and 130; in `chat` it ends the answer only."""
    arguments: tuple[object, ...] = ("--model", tiny, "--device", "cpu", "--ignore-eos")
    if verb == "generate":
        arguments += ("--prompt", "Hi")
    process = subprocess.Popen(
        command(verb, *arguments, "--max-tokens", 4000),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    if verb == "chat":
        process.stdin.write(b"Hi\n")
        process.stdin.flush()
    assert process.stdout.read(1), process.communicate()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    if verb == "generate":
        assert process.returncode == 130
        assert error.decode() == "hayate: interrupted\n"
    else:
        assert process.returncode == 0
        assert error.decode() == " [stopped]\n"
