"""An engine that tests can talk with: MODEL and the table [plugin.mooncake] (JSON, or null for no store) as arguments, JSON lines as requests."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from xllm_core.config import Settings
from xllm_core.engine.build import build_engine
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.resolve import assemble
from xllm_core.types import EngineRequest, SamplingParams

MAX_STEPS = 200_000


class Host:
    """The engine, driven step by step, so that the test sees when each first token came."""

    def __init__(self, model: str, table: dict[str, Any] | None) -> None:
        store = {"use": {"kv_store": "mooncake/store"}, "plugin": {"mooncake": table}} if table is not None else {}
        settings = Settings.from_flags(
            path=model, dtype="float32", num_blocks=128, block_size=16, max_num_seqs=4, **store
        )
        self.built = build_engine(assemble(settings, PluginManager.discover(settings).load()), settings)
        self.count = 0

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """All together, greedy."""
        engine, names = self.built.engine, []
        for prompt in prompts:
            self.count += 1
            names.append(f"r{self.count}")
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
            engine.submit(EngineRequest(names[-1], tuple(prompt), params, seed=1))
        begun_s = time.monotonic()
        tokens: dict[str, list[int]] = {name: [] for name in names}
        first_s: dict[str, float] = {}
        gaps_s, last_s, num_passing = [0.0], begun_s, 0
        for _ in range(MAX_STEPS):
            if not engine.has_work:
                break
            outputs = engine.step()
            now_s = time.monotonic()
            gaps_s.append(now_s - last_s)
            last_s = now_s
            num_passing += len(outputs) if engine.scheduler.parked else 0
            for output in outputs:
                first_s.setdefault(output.request_id, now_s - begun_s)
                tokens[output.request_id] += output.new_token_ids
        return {
            "tokens": [tokens[name] for name in names], "first_s": [first_s.get(name) for name in names],
            "longest_step_s": max(gaps_s), "passing": num_passing, "waited": engine.scheduler.stats.num_waited_for_kv,
        }  # fmt: skip

    def settle(self) -> dict[str, Any]:
        """Step until no transfer is under way: offload ends after the answer did."""
        deadline_s = time.monotonic() + 20
        while self.built.engine.scheduler.kv.stats().held_blocks and time.monotonic() < deadline_s:
            self.built.engine.step()
            time.sleep(0.005)
        return {}

    def stats(self) -> dict[str, Any]:
        """Of store and manager."""
        store, kv = self.built.store, self.built.engine.scheduler.kv.stats()
        pid = getattr(store, "client_pid", None)
        return {**(store.stats() if store is not None else {}), "store_tokens": kv.store_tokens, "client_pid": pid}

    def reset(self) -> dict[str, Any]:
        """Forget what the device holds."""
        self.built.engine.scheduler.kv.reset_prefix_cache()
        return {}


def main() -> None:
    """Answer until told to close."""
    host = Host(sys.argv[1], json.loads(sys.argv[2]))
    # As a server does: what is made at first use, a graph for instance, would be a step that waits. No prompt fills a block.
    host.generate([[3, 4], [5, 6], [7, 8]], 4)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        if name == "close":
            break
        print(json.dumps(getattr(host, name)(**request)), flush=True)
    host.built.engine.close()


if __name__ == "__main__":
    main()
