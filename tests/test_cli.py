"""The command: results on stdout, one clear line and exit code 1 for everything that can be wrong with its input."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from pyengine import cli


@pytest.fixture
def run(capfd):
    def call(*arguments) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def quantized(stories, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "stories-gwq"
    assert cli.main(["quantize", str(stories), str(out), "--group-size", "32", "--samples", "2", "--seq-len", "64"]) == 0
    return out


def fails(run, *arguments) -> str:
    """Runs a command that must fail with exit code 1, nothing on stdout and one line; returns that line."""
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("pyengine ")]
    assert code == 1 and out == "" and len(lines) == 1, (code, out, err)
    assert "Traceback" not in err
    return lines[0]


def test_generate_streams_text_and_reports(run, quantized):
    code, out, err = run("generate", quantized, "-p", "Once upon a time", "-n", 30)
    assert code == 0 and "there was" in out
    assert "tokens/s" in err and "bits per weight" in err and "MiB" in err
    code, out, _ = run("generate", quantized, "-p", "Once upon a time", "-p", "Lily", "-n", 10, "--json")
    result = json.loads(out)
    assert code == 0 and len(result["texts"]) == 2 and result["tokens"] == 20 and result["bits_per_weight"] < 8


def test_chat_answers_line_by_line(run, demo_gguf, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 2+2?\nAnd now in French.\n"))
    code, out, _ = run("chat", demo_gguf, "-n", 8, "--json")
    assert code == 0 and [m["role"] for m in json.loads(out)["messages"]] == ["user", "assistant"] * 2


def test_eval_inspect_and_bench(run, stories, quantized, data, tmp_path):
    text = tmp_path / "text"
    text.write_text((data / "wikitext2_test.txt").read_text()[:3000])
    values = {}
    for model in (stories, quantized):
        code, out, _ = run("eval", model, "--text", text, "--context", 256, "--json")
        values[model] = json.loads(out)["perplexity"]
        assert code == 0
    assert values[stories] < values[quantized] < 1.5 * values[stories]
    code, out, _ = run("eval", stories, "--tasks", data / "tasks" / "openbookqa.jsonl", "--limit", 3, "--json")
    assert code == 0 and json.loads(out)["openbookqa"]["n"] == 3
    code, out, _ = run("inspect", quantized, "--json")
    result = json.loads(out)
    assert code == 0 and result["format"] == "pyengine" and result["architecture"] == "llama"
    # 172 inputs are no multiple of 32, so down_proj has one group a row.
    assert 4.5 < result["bits_per_weight"] < 6 and 0.009 < result["outlier_share"] < 0.011
    assert result["size_bytes"] > sum(f.stat().st_size for f in quantized.glob("*.safetensors"))
    code, out, _ = run("bench", quantized, "--prompt", 20, "--decode", 4, "--runs", 1, "--batch", 2, "--json")
    result = json.loads(out)
    assert code == 0 and result["prefill_tok_s"] > 0 and result["decode_tok_s"] > 0 and result["gb_per_s"] > 0
    for shares in (result["prefill_kernels"], result["decode_kernels"]):
        assert sum(shares.values()) == pytest.approx(1) and any(kernel.startswith("attention") for kernel in shares)
    assert 0 < result["outside_kernels"] < 1 and 0 < result["load_s"] < 60
    memory = result["memory_mib"]
    assert memory["resident"] > memory["torch"] > 20 and memory["beyond"] == pytest.approx(
        memory["resident"] - memory["torch"] - memory["weights"] - memory["kv"], abs=0.3
    )


def test_activations_in_8_bits_stay_close(run, stories, tmp_path, data):
    text = tmp_path / "text"
    text.write_text((data / "wikitext2_test.txt").read_text()[:3000])
    found = []
    for act_bits in (16, 8):
        out = tmp_path / f"a{act_bits}"
        assert run("quantize", stories, out, "--method", "rtn", "--bits", 8, "--group-size", 32, "--act-bits", act_bits)[0] == 0
        found.append(json.loads(run("eval", out, "--text", text, "--context", 256, "--json")[1])["nll"])
    assert found[0] != found[1] and abs(found[0] - found[1]) < 0.05


def test_a_kv_cache_of_8_bits_by_option_and_by_checkpoint(run, quantized, stories, tmp_path, data):
    text = tmp_path / "text"
    text.write_text((data / "wikitext2_test.txt").read_text()[:3000])
    asks = tmp_path / "asks"
    assert run("quantize", stories, asks, "--method", "rtn", "--kv-bits", 8)[0] == 0
    assert json.loads(run("inspect", asks, "--json")[1])["quantization"]["kv_bits"] == 8
    for model, option, expected in ((quantized, (), 16), (quantized, ("--kv-bits", 8), 8), (asks, (), 8), (asks, ("--kv-bits", 16), 16)):
        _, out, _ = run("bench", model, "--prompt", 20, "--decode", 2, "--runs", 1, *option, "--json")
        assert json.loads(out)["kv_bits"] == expected
    found = [json.loads(run("eval", quantized, "--text", text, "--context", 256, "--kv-bits", bits, "--json")[1])["nll"] for bits in (16, 8)]
    assert found[0] != found[1] and abs(found[0] - found[1]) < 0.02
    code, out, _ = run("generate", quantized, "-p", "Once upon a time", "-n", 20, "--kv-bits", 8, "--json")
    assert code == 0 and json.loads(out)["tokens"] == 20


def test_wrong_usage_is_exit_code_2():
    for arguments in ([], ["generate"], ["generate", "-p", "x", "--top-k", "many"], ["eval", "m"], ["fly"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2


def test_the_installed_command_exits_with_1(tmp_path):
    done = subprocess.run([sys.executable, "-m", "pyengine.cli", "inspect", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1


def test_output_that_cannot_be_written_is_exit_code_1(quantized):
    for target in ("/dev/full", "closed pipe"):
        command = [sys.executable, "-m", "pyengine.cli", "inspect", str(quantized)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        if target == "/dev/full":
            with open(target, "w") as out:
                done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment)
            assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr
        else:
            reader, writer = os.pipe()
            os.close(reader)
            done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
            os.close(writer)
            assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Broken pipe" in done.stderr


def test_bad_models(run, stories, tmp_path, demo_gguf):
    def broken(name: str, change) -> str:
        folder = tmp_path / name
        shutil.copytree(stories, folder)
        change(folder)
        return fails(run, "generate", folder, "-p", "Once", "-n", 2)

    def config(**changes):
        return lambda f: (f / "config.json").write_text(json.dumps(json.loads((f / "config.json").read_text()) | changes))

    def tensors(change):
        def rewrite(f):
            state = load_file(f / "model.safetensors")
            change(state)
            save_file(state, f / "model.safetensors", metadata={"format": "pt"})

        return rewrite

    def cut(f, keep: int):
        data = (f / "model.safetensors").read_bytes()
        (f / "model.safetensors").write_bytes(data[:keep])

    q = "model.layers.2.self_attn.q_proj.weight"
    assert "no such file or directory" in fails(run, "generate", tmp_path / "nothing", "-p", "x")
    assert "model_type 'mamba' is not supported" in broken("type", config(model_type="mamba"))
    assert "num_hidden_layers" in broken("layers", config(num_hidden_layers="many"))
    assert "cannot share" in broken("heads", config(num_key_value_heads=3))
    assert "num_attention_heads is 0" in broken("zero", config(num_attention_heads=0))
    assert "rope_scaling is 'linear'" in broken("word", config(rope_scaling="linear"))
    assert "factor must be a positive number" in broken("factor", config(rope_scaling={"rope_type": "linear", "factor": 0}))
    assert "tie_word_embeddings is 'false'" in broken("tie", config(tie_word_embeddings="false"))
    assert "q_proj.bias: missing" in broken("bias", config(attention_bias=True))
    assert "quantization_config is str" in broken("scheme", config(quantization_config="x"))
    assert "kv_bits is 3" in broken("kv", config(quantization_config={"quant_method": "pyengine", "kv_bits": 3}))
    assert "rope scaling 'yarn' is not supported" in broken("rope", config(rope_scaling={"rope_type": "yarn", "factor": 2}))
    assert "quantized by 'gptq'" in broken("gptq", config(quantization_config={"quant_method": "gptq"}))
    assert "model.layers.5" in broken("deeper", config(num_hidden_layers=6))
    assert "layers.0.self_attn.q_proj.weight: shape [64, 64], expected [128, 64]" in broken("shape", config(head_dim=16))
    assert f"{q}: 1 of 4096 values are NaN" in broken("nan", tensors(lambda s: s[q].view(-1)[7].fill_(float("nan"))))
    assert q in broken("missing", tensors(lambda s: s.pop(q)))
    undeclared = tensors(lambda s: s.update({q.replace("weight", "bias"): s[q][0].clone()}))
    assert "q_proj.bias: there, but config.json says that the layer has none" in broken("undeclared", undeclared)
    for keep in (0, 5, 1000, 500_000):
        assert "model.safetensors" in broken(f"cut{keep}", lambda f, keep=keep: cut(f, keep))
    half = tmp_path / "half.gguf"
    half.write_bytes(demo_gguf.read_bytes()[:5_000_000])
    assert "half.gguf" in fails(run, "generate", half, "-p", "Once")


def test_flipped_bits_in_a_checkpoint_of_ours_are_found(run, quantized, tmp_path):
    folder = tmp_path / "flipped"
    shutil.copytree(quantized, folder)
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    for at in range(len(data) // 2, len(data), len(data) // 7):
        flipped = data.copy()
        flipped[at] ^= 4
        file.write_bytes(flipped)
        assert "checksum" in fails(run, "inspect", folder)
        fails(run, "generate", folder, "-p", "Once", "-n", 1)


def test_bad_prompts_texts_and_options(run, quantized, stories, tmp_path):
    bad = tmp_path / "latin1.txt"
    bad.write_bytes(b"caf\xe9 au lait")
    assert "not UTF-8" in fails(run, "eval", stories, "--text", bad)
    assert "UTF-8" in fails(run, "quantize", stories, tmp_path / "out", "--calib", bad)
    assert not (tmp_path / "out").exists()
    assert "context holds 512" in fails(run, "generate", quantized, "-p", "one two three " * 300)
    assert "the prompt is empty" in fails(run, "generate", quantized, "-p", "")
    assert "not Unicode: character 1" in fails(run, "generate", quantized, "-p", "a\udcff")
    assert "limit is 0" in fails(run, "eval", quantized, "--tasks", bad, "--limit", 0)
    assert "limit_tokens is -3" in fails(run, "eval", quantized, "--text", stories / "config.json", "--limit-tokens", -3)
    assert "device is 'cuda'" in fails(run, "generate", quantized, "-p", "a", "--device", "cuda")
    assert "kv_bits is 3, expected 16, 8 or 4" in fails(run, "generate", quantized, "-p", "a", "--kv-bits", 3)
    assert "kv_bits is 5, expected one of 4, 8, 16" in fails(run, "quantize", stories, tmp_path / "out", "--kv-bits", 5)
    assert "quantized already" in fails(run, "quantize", quantized, tmp_path / "twice")
    assert "context is 513, expected 2 to 512" in fails(run, "eval", quantized, "--text", stories / "config.json", "--context", 513)
    assert "temperature is -1.0" in fails(run, "generate", quantized, "-p", "a", "--temperature", -1)
    assert "context is 1" in fails(run, "eval", quantized, "--text", stories / "config.json", "--context", 1)
    assert "method is 'magic'" in fails(run, "quantize", stories, tmp_path / "out", "--method", "magic")
    assert "exists" in fails(run, "quantize", stories, quantized)
    assert "threads is 99999999999" in fails(run, "generate", quantized, "-p", "a", "--threads", 99999999999)
    assert "threads is 0" in fails(run, "generate", quantized, "-p", "a", "--threads", 0)
    assert "decode is 0" in fails(run, "bench", quantized, "--decode", 0)
    assert "512" in fails(run, "bench", quantized, "--prompt", 600)
