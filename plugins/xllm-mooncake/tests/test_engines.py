"""Engines in processes of their own that share a real master."""

from __future__ import annotations

from .conftest import NUM_BLOCKS, Pair
from .real_master import wait_for


def test_a_second_engine_serves_a_prefix_that_it_never_computed(pair: Pair) -> None:
    """Blocks of the first engine, offloaded when its requests ended, are found by the second, and its tokens are those of no store at all."""
    for _ in range(4):
        pair.store()
        found = pair.second.generate(*pair.prompts)
        gained = pair.delta()
        assert found["tokens"] == pair.expected
        if not gained["lookup_timeouts"]:
            break
        pair.renew()  # on a busy machine the store may be late, and prompts are then computed: once more, with others
    assert (
        gained["store_tokens"] >= 16 * NUM_BLOCKS and gained["loaded_blocks"] >= NUM_BLOCKS and gained["hits"] >= 1
    ), gained
    assert gained["laters"] >= 1, "the store answers later"
    assert (gained["bad_values"], gained["failed_loads"], gained["breaker_openings"]) == (0, 0, 0)
    pair.second.ask(do="settle")
    assert pair.delta()["stored_blocks"] < NUM_BLOCKS, "what is there is not stored again"


def test_others_run_while_one_waits(pair: Pair) -> None:
    """A request whose blocks are on their way stands aside; others get tokens meanwhile."""
    pair.store()
    pair.master.pause()  # so that it waits for sure, until its time is over
    prompts = [[5, 6, 7], pair.prompts[0]]
    found = pair.second.generate(*prompts, max_tokens=40)
    pair.master.resume()
    assert found["passing"] > 0, found
    assert found["tokens"] == pair.plain.generate(*prompts, max_tokens=40)["tokens"]


def test_blocks_come_back_after_the_device_forgot_them(pair: Pair) -> None:
    """Offload and restore in one engine: the same tokens, and nothing computed twice that was stored."""
    pair.store()
    before = pair.first.stats()
    pair.first.ask(do="reset")
    assert pair.first.generate(*pair.prompts)["tokens"] == pair.expected
    after = wait_for(
        lambda: (now := pair.first.stats())["loaded_blocks"] >= before["loaded_blocks"] + NUM_BLOCKS and now, "loads"
    )
    assert after["stored_blocks"] < before["stored_blocks"] + NUM_BLOCKS, "what is there is not stored again"
