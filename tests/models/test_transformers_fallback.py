"""Architectures without a family of ours: transformers' own layers over paged KV, against transformers itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fixtures.tiny_models import load_oracle
from tests.models.mixed import logits_in_mixed_batches, random_prompts
from xllm_core import LLM, SamplingParams
from xllm_core.errors import ModelError
from xllm_core.models.llama import Llama
from xllm_core.models.transformers_fallback import TransformersFallback
from xllm_core.plugins.contracts.model import ForwardContext
from xllm_core.reference.attention import ReferenceAttention
from xllm_core.reference.ops import KvWrite
from xllm_core.runtime.formats.safetensors_dir import SafetensorsDirectory
from xllm_core.testing.model_harness import Harness
from xllm_core.testing.verify import Scale, Verifier

Tiny = Callable[..., Path]
PINNED = {"use": {"model": "core/transformers"}}

# The first five are those that the feature is promised for; the others are what they do not show.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3", {}),
    "mistral, window": ("mistral", {"sliding_window": 9}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "gemma2, soft cap in attention": ("gemma2", {}),
    "gpt2, learned positions, tied": ("gpt2", {}),
    "gpt_neox, another name for its head": ("gpt_neox", {}),
    "opt, positions that start at 2": ("opt", {}),
    "mixtral, experts stacked while loading": ("mixtral", {}),
}


def opened(path: Path) -> Any:
    return SafetensorsDirectory().open(path)


@pytest.mark.parametrize("name", CASES)
def test_logits(tiny: Tiny, name: str) -> None:
    """|Δlogit| <= 1e-4 in float32: whole, in chunks of 8 and of 1, prefill then decode, all in one batch. Killed by: positions, windows,
    scales, multipliers, caps or rows of another sequence (each was tried); unwritten cache is NaN.
    """
    kind, overrides = CASES[name]
    path = tiny(kind, **overrides)
    prompts = random_prompts()
    with torch.no_grad():
        expected = load_oracle(path)(prompts).logits
    ours = logits_in_mixed_batches(Harness(TransformersFallback(), opened(path)), prompts)
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["gemma3", "mixtral"])
def test_bfloat16_rounds_where_transformers_does(tiny: Tiny, kind: str) -> None:
    """No further from float32 than transformers is. Killed by: weights, tables or scales kept in another dtype."""
    path = tiny(kind)
    prompt = random_prompts()[:1]
    with torch.no_grad():
        expected = load_oracle(path, "bfloat16")(prompt).logits[0].float()
        exact = load_oracle(path)(prompt).logits[0]
    ours = Harness(TransformersFallback(), opened(path), dtype="bfloat16").step({0: prompt[0].tolist()})[0]
    assert (ours - exact).abs().mean() <= 1.2 * (expected - exact).abs().mean()


@pytest.mark.parametrize("name", list(CASES)[:5])
def test_layers_are_layers(tiny: Tiny, name: str) -> None:
    """What stands between two of our layers is what transformers has there, so a boundary means what the contract says. Killed by: running
    the layers as one, or the embedding's scale in another place than before layer 0.
    """
    kind, overrides = CASES[name]
    path = tiny(kind, **overrides)
    tokens = random_prompts()[:1]
    with torch.no_grad():
        expected = load_oracle(path)(tokens, output_hidden_states=True).hidden_states
    harness = Harness(TransformersFallback(), opened(path))
    seen: list[torch.Tensor] = []

    def listening(layer: Any) -> Any:
        def run(h: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
            seen.append(layer(h, ctx))
            return seen[-1]

        return run

    harness.model.layers = [listening(layer) for layer in harness.model.layers]
    harness.step({0: tokens[0].tolist()})
    assert len(seen) == len(expected) - 1
    for ours, theirs in zip(seen[:-1], expected[1:-1], strict=True):  # transformers norms the last
        assert (ours - theirs[0]).abs().max() <= 1e-4


def test_a_layer_asked_by_itself_knows_its_positions(tiny: Tiny) -> None:
    """A later stage of a divided model starts with a later layer. Killed by: only layer 0 working out what all of them are given."""
    harness = Harness(TransformersFallback(), opened(tiny("granite")))
    layers = list(harness.model.layers)
    tokens = {0: random_prompts()[0].tolist()}
    whole = harness.step(tokens)[0]

    def first(h: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        h = layers[0](h, ctx)
        ctx.memo.clear()  # as if this layer had run elsewhere
        return h

    harness.model.layers = [first, *layers[1:]]
    assert torch.equal(harness.step({1: tokens[0]})[1], whole)


# ---- the cache is read in place -------------------------------------------------------------------------------------------------


class _CacheWatch(TorchDispatchMode):
    """Every torch op of a step that is given cache memory, with the bytes of what it returns; and the largest tensor made outside of kernels."""

    def __init__(self, harness: Harness) -> None:
        super().__init__()
        attentions = harness.parts._attentions.values()
        self.caches = {
            tensor.untyped_storage().data_ptr() for attention in attentions for tensor in attention.segments.own
        }
        self.on_cache: list[tuple[str, int]] = []
        self.largest_bytes = 0
        self.shapes: set[tuple[int, ...]] = set()
        self.is_in_kernel = False

    def leave_out_kernels(self, patch: pytest.MonkeyPatch) -> None:
        """What a kernel makes for itself is its own affair."""
        for name in ("plan", "run"):
            method = getattr(ReferenceAttention, name)

            def inside(kernel: Any, *args: Any, method: Any = method) -> Any:
                self.is_in_kernel = True
                try:
                    return method(kernel, *args)
                finally:
                    self.is_in_kernel = False

            patch.setattr(ReferenceAttention, name, inside)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [tensor for tensor in _tensors((out,)) if tensor.untyped_storage().data_ptr() not in self.caches]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in made)
        if any(tensor.untyped_storage().data_ptr() in self.caches for tensor in _tensors(args)):
            self.on_cache.append((str(func), num_bytes))
        elif not self.is_in_kernel:
            self.largest_bytes = max(self.largest_bytes, num_bytes)
            self.shapes |= {tuple(tensor.shape) for tensor in made}
        return out


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def watched_decode(
    family: Any, path: Path, num_cached: int, patch: pytest.MonkeyPatch
) -> tuple[_CacheWatch, list[int]]:
    """One decode step of two rows with `num_cached` tokens; the bytes handed to each `kv_write`."""
    harness = Harness(family, opened(path), max_len=256)
    tokens = torch.randint(0, 128, (num_cached,)).tolist()
    harness.step({0: tokens, 1: tokens})
    watch, written = _CacheWatch(harness), []
    watch.leave_out_kernels(patch)
    write = KvWrite.__call__

    def noted(op: Any, new: Any, caches: Any, slots: Any) -> None:
        written.append(sum(tensor.numel() * tensor.element_size() for tensor in new))
        write(op, new, caches, slots)

    patch.setattr(KvWrite, "__call__", noted)
    with watch:
        harness.step({0: [5], 1: [6]})
    patch.undo()
    return watch, written


def test_a_decode_step_touches_the_cache_as_our_own_family_does(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ops on cache memory, in the same order, of the same sizes: `kv_write` of a token's own keys and values, and the kernel.
    What the fallback adds outside of the kernel does not grow with the context. Killed by: any gather, repeat or copy of cached KV.
    """
    path = tiny("llama")
    ours, our_writes = watched_decode(Llama(), path, 200, monkeypatch)
    long, writes = watched_decode(TransformersFallback(), path, 200, monkeypatch)
    short, _ = watched_decode(TransformersFallback(), path, 20, monkeypatch)
    assert long.on_cache == ours.on_cache and long.on_cache
    own_bytes = 2 * 2 * (2 * 8) * 4  # two rows; keys and values; two heads of eight; float32
    assert writes == our_writes == [own_bytes] * 2  # two layers
    assert long.largest_bytes == short.largest_bytes


def test_no_mask_is_made(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would make one of T x T; ours has none, as rows of many sequences share T. Killed by: a mask function under our name."""
    harness = Harness(TransformersFallback(), opened(tiny("gemma3")), max_len=128)
    watch = _CacheWatch(harness)
    watch.leave_out_kernels(monkeypatch)
    num_tokens = 101  # no other size here
    with watch:
        harness.step({0: list(range(num_tokens))}, all_logits=False)
    assert any(num_tokens in shape for shape in watch.shapes)
    assert not [shape for shape in watch.shapes if shape.count(num_tokens) > 1]


# ---- in an engine ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CASES)[:5])
def test_tokens_of_an_engine(tiny: Tiny, name: str) -> None:
    """Greedy tokens are transformers' own: all at once, chunked, from the prefix cache, and with too few blocks for all. Killed by: state
    between steps or rows, KV of another row, a window group that forgets too early.
    """
    kind, overrides = CASES[name]
    path = tiny(kind, **overrides)
    shared = random_prompts()[0].tolist()[:34]
    prompts = [[*shared, 7], [*shared, 9, 11], [3, 4, 5], random_prompts()[1].tolist()]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    oracle, want = load_oracle(path), []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        want.append(out[0, len(prompt) :].tolist())
    settings: dict[str, Any] = {"dtype": "float32", "block_size": 4, **PINNED}
    with LLM(str(path), num_blocks=128, max_chunk_tokens=10, **settings) as roomy:
        for _ in range(2):
            assert [o.outputs[0].token_ids for o in roomy.generate(prompts, params)] == want
        kv = roomy.processor.client.engine.scheduler.kv.stats()  # type: ignore[attr-defined]
        assert kv.hit_tokens >= 32, "the prefix cache was never read"
    tight_settings = {"num_blocks": 10 if name == "mistral, window" else 16, "max_model_len": 64, "max_chunk_tokens": 4}
    with LLM(str(path), enable_prefix_cache=False, **tight_settings, **settings) as tight:
        assert [o.outputs[0].token_ids for o in tight.generate(prompts, params)] == want
        stats = tight.processor.client.engine.scheduler.stats  # type: ignore[attr-defined]
        assert stats.num_preemptions > 0, "nothing was preempted"


def test_verify(tiny: Tiny) -> None:
    """The matrix of features. Killed by: whatever makes tokens depend on what else runs."""
    path = tiny("granite", initializer_range=0.5)
    rows = ("batch mates", "chunk 16", "prefix cache", "preemption", "host store", "n > 1 forks", "overlap, stops")
    report = Verifier(str(path), dtype="float32", scale=Scale((1, 17, 33, 70), 12), memory_bytes=1 << 24).run(only=rows)
    assert report.has_passed, [(row.feature, row.differences) for row in report.rows if not row.has_passed]
    assert len(report.rows) == len(rows) and all(row.activity > 0 and row.num_tokens > 0 for row in report.rows)


def test_it_equals_our_own_family(tiny: Tiny) -> None:
    """The same checkpoint through Llama and through the fallback. Killed by: either of them being wrong."""
    checkpoint = opened(tiny("llama", attention_bias=True))
    prompts = random_prompts()
    ours = logits_in_mixed_batches(Harness(Llama(), checkpoint), prompts)
    theirs = logits_in_mixed_batches(Harness(TransformersFallback(), checkpoint), prompts)
    assert (ours - theirs).abs().max() <= 1e-4


def test_two_models_share_nothing(tiny: Tiny) -> None:
    """Interleaved steps of two built models. Killed by: the context of a step in anything that both can reach."""
    prompts = random_prompts()[0].tolist()
    one, two = (Harness(TransformersFallback(), opened(tiny("granite", attention_multiplier=m))) for m in (0.3, 0.4))
    alone = {}
    for index, harness in enumerate((one, two)):
        alone[index] = torch.cat([harness.step({0: prompts[:20]})[0], harness.step({0: prompts[20:]})[0]])
    mixed: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for part in (prompts[:20], prompts[20:]):
        for index, harness in enumerate((one, two)):
            mixed[index].append(harness.step({1: part})[1])
    assert all(torch.equal(torch.cat(mixed[index]), alone[index]) for index in alone)
    assert not torch.allclose(alone[0], alone[1])


# ---- chosen, and refused --------------------------------------------------------------------------------------------------------


def test_it_is_marked(tiny: Tiny) -> None:
    """In the reason of the plan, which `why`, `plan` and `models` print. Killed by: a fallback that looks like a family."""
    from xllm_core.config import Settings
    from xllm_core.plugins.explain import why
    from xllm_core.plugins.manager import PluginManager

    for path, tables, words in (
        (tiny("granite"), {}, ["chosen   core/transformers", "no family that names the architecture fits; fallback: transformers' own code"]),
        (tiny("llama"), PINNED, ["chosen   core/transformers", "pinned by [use] model; fallback: transformers' own code"]),
        (tiny("llama"), {}, ["chosen   core/llama", "rejected core/transformers  not asked: core/llama comes first and answers"]),
    ):  # fmt: skip
        settings = Settings(model={"path": str(path)}, **tables)
        text = why("model", settings, PluginManager.discover(settings))
        assert all(word in text for word in words), text


def test_it_is_not_asked_where_a_family_serves(tiny: Tiny) -> None:
    """So that nobody waits for transformers to be imported. In a process of its own. Killed by: asking its check first."""
    code = (
        "import sys\nfrom xllm_core.config import Settings\nfrom xllm_core.plugins.manager import PluginManager\n"
        "from xllm_core.plugins.resolve import assemble\n"
        f"settings = Settings(model={{'path': {str(tiny('llama'))!r}}})\n"
        "plan = assemble(settings, PluginManager.discover(settings)).plan\n"
        "print(plan.model.name, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["core/llama", "False"], done.stderr


SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "num_key_value_heads": 2,
}  # fmt: skip
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def of(architecture: str, model_type: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **fields}


REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "recurrent": (of("MambaForCausalLM", "mamba"), "does not go through transformers' attention interface"),
    "hybrid": (
        of("Lfm2ForCausalLM", "lfm2", **SIZES, layer_types=["conv", "full_attention"]),
        "mixes tokens outside of attention (Conv1d)",
    ),
    "encoder and decoder": (of("T5ForConditionalGeneration", "t5"), "is an encoder with a decoder"),
    "encoder": (
        of("BertForMaskedLM", "bert"),
        "is not the causal language model of model_type 'bert', which is BertLMHeadModel",
    ),
    "bias by position": (of("BloomForCausalLM", "bloom"), "does not go through transformers' attention interface"),
    "sinks": (of("GptOssForCausalLM", "gpt_oss", **SIZES), "layer 0 hands 'attention sinks' to attention"),
    "chunks": (
        of("Llama4ForCausalLM", "llama4_text", **SIZES, attention_chunk_size=16, no_rope_layers=[1, 1]),
        "sees neither everything before a token nor a sliding window",
    ),
    "both directions": (
        of("Gemma3ForCausalLM", "gemma3_text", **SIZES, use_bidirectional_attention=True),
        "sees neither everything before a token nor a sliding window",
    ),
    "two attentions in a layer": (of("DiffLlamaForCausalLM", "diffllama", **SIZES), "goes 2 times through"),
    "latent attention": (of("MiniCPM3ForCausalLM", "minicpm3", **SIZES), "has keys of size 96 and values of size 8"),
    "more than text": (of("Gemma3ForConditionalGeneration", "gemma3"), "reads more than text"),
    "frequencies that change": (
        of("Phi3ForCausalLM", "phi3", **SIZES, original_max_position_embeddings=32, rope_scaling=LONGROPE),
        "its longrope changes frequencies beyond 32 tokens",
    ),
    "quantised": (
        of("GraniteForCausalLM", "granite", **SIZES, quantization_config={"quant_method": "awq"}),
        "quantised weights ('awq')",
    ),
    "a value of another kind": (
        of("GraniteForCausalLM", "granite", **{**SIZES, "hidden_size": "big"}),
        "transformers refuses this configuration",
    ),
    "unknown to transformers": (
        of("GraniteForCausalLM", "granit"),
        "has no model_type 'granit'; did you mean 'granite'?",
    ),
    "code of the model's own": (
        of("OwnForCausalLM", "own_kind_of", auto_map={"AutoModel": "m.Own"}),
        "code that comes with a model is never run",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(name: str) -> None:
    """By name of the file. Killed by: serving it, or an error that is transformers' own."""
    config, reason = REFUSED[name]
    with pytest.raises(ModelError) as caught:
        TransformersFallback().shape({**config, "_source": "/models/x/config.json"})
    assert reason in str(caught.value)
    assert str(caught.value).startswith("/models/x/config.json: ")


@pytest.mark.parametrize("habit", ["between layers", "by token ids"])
def test_a_loop_that_does_more_than_call_layers_is_refused(habit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class from outside that changes hidden states between two layers, or looks at token ids again. Killed by: not watching the loop."""
    import transformers

    granite = transformers.models.granite.modeling_granite
    plain = granite.GraniteModel.forward

    class Between(torch.nn.ModuleList):
        """A list of layers that are given something else than what the one before returned."""

        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            if not isinstance(index, slice):
                return found
            return [found[0], lambda hidden, **given: found[1](hidden + 0, **given)]

    def forward(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **given: Any) -> Any:
        if habit == "between layers":
            self.layers.__class__ = Between
        elif input_ids is not None:
            inputs_embeds, input_ids = self.embed_tokens(input_ids) * 2, None
        return plain(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **given)

    monkeypatch.setattr(granite.GraniteModel, "forward", forward)
    reason = {
        "between layers": "it computes between its layers",
        "by token ids": "more of the token ids than their embeddings",
    }
    with pytest.raises(ModelError, match=reason[habit]):
        TransformersFallback().shape(of("GraniteForCausalLM", "granite", **SIZES, rms_norm_eps=0.25))


def test_an_unknown_architecture_keeps_its_guess(tiny: Tiny, tmp_path: Path) -> None:
    """And says why the fallback cannot help. Killed by: either half missing."""
    import json

    for file in tiny("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLm"]}))
    with pytest.raises(ModelError) as caught:
        LLM(str(tmp_path), dtype="float32")
    assert "architecture 'LlamaForCausalLm' is not known; did you mean 'LlamaForCausalLM'?" in str(caught.value)
    assert "core/transformers cannot serve it: " in str(caught.value)
    assert "LlamaForCausalLm is not the causal language model of model_type 'llama', which is LlamaForCausalLM" in str(
        caught.value
    )
