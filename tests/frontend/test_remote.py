"""The far side of an engine process, without one: what counts as unfinished."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from xllm_core.engine import messages
from xllm_core.engine.info import EngineInfo
from xllm_core.engine.messages import Frames, encode, to_engine
from xllm_core.frontend.remote import EngineProcess
from xllm_core.types import EngineRequest, SamplingParams, TokenOutput

INFO = EngineInfo("m", "A", "float32", "cpu", 64, 100, 64, 8, 8)


@pytest.fixture
def engine() -> EngineProcess:
    """Ready, with a transport that only keeps what is written."""
    made = EngineProcess({}, on_output=Mock(), on_death=Mock())
    made._transport, made._info = Mock(), INFO
    return made


def sent(engine: EngineProcess) -> list[messages.ToEngine]:
    frames = Frames()
    return [to_engine.decode(body) for call in engine._transport.write.mock_calls for body in frames.feed(call.args[0])]


def test_a_sequence_ends_once(engine: EngineProcess) -> None:
    """A stop string and the engine may end the same sequence in one read: its siblings are still there, and can be aborted."""
    engine.submit(EngineRequest("a", (1,), SamplingParams(n=3, max_tokens=4), seed=0))
    ended = TokenOutput("a", 1, (5,), "stop")
    engine.data_received(encode(messages.Stepped([ended], messages.EngineStats())))
    engine.abort("a", 1)
    assert engine.num_unfinished == 2 and engine.holds("a")
    engine.abort("a")
    assert engine.num_unfinished == 0 and sent(engine)[-1] == messages.Abort("a")
    engine.abort("a")  # gone: nothing more to say
    assert sum(isinstance(message, messages.Abort) for message in sent(engine)) == 2


def test_messages_in_any_pieces() -> None:
    """A stream cut anywhere gives the same messages; a length that cannot be is refused."""
    stream = b"".join(encode(messages.Abort(f"r{i}", i)) for i in range(20))
    for size in (1, 3, 7, len(stream)):
        frames = Frames()
        found = [to_engine.decode(b) for at in range(0, len(stream), size) for b in frames.feed(stream[at : at + size])]
        assert found == [messages.Abort(f"r{i}", i) for i in range(20)]
