"""What is asked and when: lengths, arrivals, traces and prompts, exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xllm_core.errors import ConfigError
from xllm_core.loadgen.workload import Ask, Prompts, check_context, fixed_lengths, poisson, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 19:14:19.9280160,549,173
"""
MOONCAKE = """{"timestamp": 27000, "input_length": 1600, "output_length": 500, "hash_ids": [0, 1, 2, 3]}
{"timestamp": 30000, "input_length": 1100, "output_length": 0, "hash_ids": [0, 1, 9]}
{"timestamp": 30500, "input_length": 700, "output_length": 7, "hash_ids": [8, 7]}
"""


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    """Its last line without an end, as the real file has it."""
    path = tmp_path / "azure.csv"
    path.write_text(AZURE.rstrip())
    return path


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    """The first two begin with the same two blocks, the third with another."""
    path = tmp_path / "mooncake.jsonl"
    path.write_text(MOONCAKE)
    return path


def test_azure_rows(azure: Path) -> None:
    """Times begin at 0, to the digit. Dies if seven digits are cut, or the header is taken for a row."""
    asks = read_trace(azure)
    assert [(ask.input_tokens, ask.output_tokens) for ask in asks] == [(4808, 10), (3180, 8), (549, 173)]
    assert [ask.due_s for ask in asks] == pytest.approx([0.0, 0.052, 3435.948056], abs=1e-6)


def test_factors_scale_lengths_and_times(azure: Path) -> None:
    """Rounded to whole tokens, at least one. Dies if a factor is applied twice, inverted, or to the other side."""
    asks = read_trace(azure, num_requests=2, length_factor=0.05, time_factor=10)
    assert [(ask.input_tokens, ask.output_tokens) for ask in asks] == [(240, 1), (159, 1)]
    assert [ask.due_s for ask in asks] == pytest.approx([0.0, 0.52], abs=1e-6)


@pytest.mark.parametrize("factor", [1.0, 0.37, 0.01, 0.0001, 2.0])
def test_mooncake_prefixes_stay_shared(mooncake: Path, factor: float) -> None:
    """Equal leading ids are equal leading tokens at every scale, and no more. Dies if blocks are rounded one by one."""
    asks = read_trace(mooncake, length_factor=factor)
    lengths = [max(1, round(length * factor)) for length in (1600, 1100, 700)]
    assert [ask.input_tokens for ask in asks] == lengths
    assert [ask.due_s for ask in asks] == [0.0, 3.0, 3.5]
    prompts = Prompts.of_vocabulary(5, 40_000)
    first, second, third = (prompts.ids(ask) for ask in asks)
    assert [len(ids) for ids in (first, second, third)] == lengths
    shared = round(2 * 512 * factor)
    assert first[:shared] == second[:shared]
    if factor >= 0.01:
        assert first[shared : shared + 4] != second[shared : shared + 4]
        assert first[:5] != third[:5]


def test_a_block_in_part_is_the_beginning_of_the_whole() -> None:
    """The last block of a prompt may be cut. Dies if its tokens then are others."""
    prompts = Prompts.of_vocabulary(0, 1000)
    whole = prompts.ids(Ask(0, 512, 1, prefix=((7, 512),)))
    part = prompts.ids(Ask(1, 100, 1, prefix=((7, 100),)))
    assert whole[:100] == part


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "TIMESTAMP,A,B\n2023-11-16 18:17:03.97,12\n", "t.csv:2: not a row"),
        ("t.csv", "TIMESTAMP,A,B\nyesterday,1,2\n", "t.csv:2: not a row"),
        ("t.csv", "TIMESTAMP,A,B\n", "there is no request"),
        (
            "t.jsonl",
            '{"timestamp": 1, "input_length": 5}\n',
            "t.jsonl:1: not a row of such a trace: KeyError: 'output_length'",
        ),
        ("t.jsonl", "[1]\n", "t.jsonl:1: not a row"),
        ("t.jsonl", "{\n", "t.jsonl:1: not a row"),
        (
            "t.jsonl",
            '{"timestamp": 1, "input_length": 600, "output_length": 1, "hash_ids": [1, 2, 3]}\n',
            "do not fit together",
        ),
        (
            "t.jsonl",
            '{"timestamp": 1, "input_length": 600, "output_length": 1, "hash_ids": [1, -2]}\n',
            "do not fit together",
        ),
        ("t.txt", "x", "must end in .csv"),
    ],
)
def test_a_damaged_trace_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    """With its line. Dies if a row is passed over."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        read_trace(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(tmp_path / f"nowhere-{name}".replace(".txt", ".csv"))


def test_poisson_arrivals() -> None:
    """Seeded, from 0, with the mean and the spread of exponential gaps. Dies if the rate is taken for the gap."""
    asks = poisson(fixed_lengths(20_000, 8, 8), rate=50.0, seed=3)
    dues = np.array([ask.due_s for ask in asks])
    gaps = np.diff(dues)
    assert dues[0] == 0.0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)  # even gaps would have none
    assert np.mean(gaps > 1 / 50) == pytest.approx(np.exp(-1), abs=0.02)
    assert poisson(fixed_lengths(9, 8, 8), 50.0, 3) == poisson(fixed_lengths(9, 8, 8), 50.0, 3)
    assert poisson(fixed_lengths(9, 8, 8), 50.0, 3) != poisson(fixed_lengths(9, 8, 8), 50.0, 4)
    assert poisson([], 1.0, 0) == []


def test_prompts() -> None:
    """As long as asked, within the vocabulary, different for each request and seed, the same again. Dies with a shared stream."""
    prompts = Prompts.of_vocabulary(1, 128)
    asks = fixed_lengths(3, 2000, 8)
    ids = [prompts.ids(ask) for ask in asks]
    assert {len(prompt) for prompt in ids} == {2000}
    assert (min(map(min, ids)), max(map(max, ids))) == (10, 127)
    assert ids[0] != ids[1] and ids[0] == prompts.ids(asks[0]) and ids[0] != Prompts.of_vocabulary(2, 128).ids(asks[0])
    assert len(prompts.text(asks[0]).split()) == 2000
    assert set(Prompts.of_vocabulary(0, 2).ids(asks[0])) == {1}


def test_too_long_requests_are_refused_with_a_factor_that_fits() -> None:
    """The factor it names works. Dies if the answer's tokens are forgotten."""
    asks = [Ask(0, 100, 20), Ask(1, 3000, 1000)]
    check_context(asks, 4000)
    with pytest.raises(
        ConfigError, match=r"1 of 2 requests are longer than the model's context of 3999 tokens.*--input-len"
    ):
        check_context(asks, 3999)
    with pytest.raises(ConfigError, match=r"try --length-factor 0\.1\d") as raised:
        check_context(asks, 512, 1.0)
    factor = float(str(raised.value).rpartition(" ")[2])
    check_context([Ask(1, round(3000 * factor), round(1000 * factor))], 512)
