"""How a master is started for development: on loopback, with nothing that listens beyond it."""

from __future__ import annotations

import os

from xllm_mooncake.here import master_binary


def master_command(port: int, metrics_port: int, host: str = "127.0.0.1") -> list[str]:
    """The command. Without --metrics_host its second port would listen on every address. Raises FileNotFoundError."""
    return [
        master_binary(), f"--rpc_address={host}", f"--rpc_port={port}", f"--metrics_host={host}", f"--metrics_port={metrics_port}",
        "--rpc_thread_num=2", "--logtostderr=1",
    ]  # fmt: skip


def master_environment() -> dict[str, str]:
    """Errors only: what it says of each request is of no use here."""
    return {**os.environ, "GLOG_minloglevel": "2"}
