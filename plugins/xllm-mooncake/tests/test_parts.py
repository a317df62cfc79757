"""Breaker, knowledge of keys and the form of a value, by themselves and with a clock of their own."""

from __future__ import annotations

import select

import pytest
import torch
from xllm_mooncake.breaker import FIRST_WAIT_S, MAX_WAIT_S, Breaker
from xllm_mooncake.client import Client
from xllm_mooncake.index import ABSENT_S, BELIEVED_S, HELD_S, Knowledge
from xllm_mooncake.staging import HEADER_BYTES, Staging, part_of

from xllm_core.plugins import Hit, Later, Miss
from xllm_core.testing.store_bench import geometry, keys_of


class Clock:
    """Seconds that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_breaker_probes_less_and_less_often(clock: Clock) -> None:
    """Waits double up to a bound; after closing they begin anew. Openings count, failed probes do not."""
    breaker, waits = Breaker(clock=clock), []
    for _ in range(6):
        breaker.open("dead")
        waits.append(breaker.wait_s)
        clock.now_s += breaker.wait_s
        assert breaker.wait_s == 0 and not breaker.is_closed
    assert waits == pytest.approx([FIRST_WAIT_S, 0.5, 1.0, MAX_WAIT_S, MAX_WAIT_S, MAX_WAIT_S])
    assert breaker.num_openings == 1 and breaker.reason == "dead"
    breaker.close()
    breaker.open("again")
    assert (breaker.wait_s, breaker.num_openings) == (pytest.approx(FIRST_WAIT_S), 2)


def test_a_chain_is_asked_once_and_waits_no_longer_than_it_may(clock: Clock) -> None:
    """Later while the answer is out, a miss when its time is over, and no second question meanwhile."""
    known, keys = Knowledge(0.5, clock=clock), keys_of("k", 4)
    assert known.chain(keys) == (Later(), keys)
    assert known.chain(keys) == (Later(), []), "asked already"
    clock.now_s += 0.6
    assert known.chain(keys) == (Miss(), [])
    known.learn(keys, [True, True, False, True])
    assert known.chain(keys) == (Hit(2), [])
    assert known.each(keys) == ([True, True, False, True], [])
    clock.now_s += ABSENT_S + 0.1
    assert known.chain(keys)[1] == keys[2:3], "absence is believed for a short time"
    clock.now_s += HELD_S
    assert known.chain(keys)[0] != Hit(2), "the lease may be over"


def test_what_is_wanted(clock: Clock) -> None:
    """Neither what is believed to be there nor what is on its way; evicted blocks are offered again after a while."""
    known, keys = Knowledge(0.5, clock=clock), keys_of("k", 3)
    known.learn(keys[:1], [True])
    known.begin_save(keys[1:2])
    assert known.wanted(keys) == [False, False, True]
    assert known.chain(keys[1:2]) == (Later(), [])
    known.end_save(keys[1:2])
    clock.now_s += BELIEVED_S + 1
    assert known.wanted(keys) == [True, True, True]
    known.learn(keys, [True] * 3)
    known.forget()
    assert known.wanted(keys) == [True, True, True]


def test_more_than_can_be_on_its_way_is_dropped_and_counted(clock: Clock) -> None:
    """A store that takes nothing does not fill the memory."""
    known = Knowledge(0.5, clock=clock)
    known.begin_save(keys_of("queued", 4096))
    assert known.wanted(keys_of("more", 3)) == [False] * 3
    assert known.counts["dropped_blocks"] == 3


def test_values_are_bound_to_key_content_and_secret() -> None:
    """Any byte of header or blocks, another key, other sizes, another secret: not the value. The blocks come back as they were."""
    shape = geometry("BSGD", 4)
    part = part_of(shape, (0,))
    assert part == (0, 1) and part_of(shape, (2,)) == (2,)
    key, other = keys_of("k", 2)
    staging = Staging(shape, 1 << 16, "secret")
    (slot,) = staging.take(1, is_for_load=False)
    blocks = [torch.randint(0, 256, (shape.block_bytes[g],), dtype=torch.uint8) for g in part]
    staging.write(slot, key, part, blocks)
    read = staging.read(slot, key, part)
    assert read is not None and all(torch.equal(a, b) for a, b in zip(read, blocks, strict=True))
    assert staging.read(slot, other, part) is None and staging.read(slot, key, (1, 0)) is None
    for at in (0, 8, 20, 47, HEADER_BYTES, HEADER_BYTES + sum(shape.block_bytes[:2]) - 1):
        staging._bytes[slot.start + at] ^= 1
        assert staging.read(slot, key, part) is None, f"byte {at} was altered"
        staging._bytes[slot.start + at] ^= 1
    assert staging.read(slot, key, part) is not None
    staging._key = b"another"
    assert staging.read(slot, key, part) is None
    with pytest.raises(ValueError, match="bytes, the geometry says"):
        staging.write(slot, key, part, [blocks[0][:-1], blocks[1]])
    staging.close()


def test_the_clients_process_ends_with_its_engine_also_when_an_answer_is_unread() -> None:
    """A socket that is closed with something unread in it is reset, not ended. Dies with a process that outlives its engine."""
    staging = Staging(geometry("BSGD", 4), 1 << 16, None)
    client = Client("127.0.0.1", staging.fd, staging.num_bytes)
    client.start()
    process, line = client._process, client._line
    assert process is not None and line is not None
    line.sendall(b'{"number": 1, "do": "nothing"}\n')
    assert select.select([line], [], [], 30)[0], "no answer"
    line.close()
    assert process.wait(30) == 0
    client.kill()
    staging.close()
