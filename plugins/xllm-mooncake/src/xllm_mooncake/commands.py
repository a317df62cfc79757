"""`xllm mooncake up`."""

from __future__ import annotations

import signal
import subprocess
import time

import click

from xllm_mooncake.client import answers
from xllm_mooncake.master import master_command, master_environment

_START_S = 15.0
_END_S = 5.0


@click.command("up")
@click.option(
    "--port", default=50051, show_default=True, type=click.IntRange(1, 65535), help="Where engines reach the master."
)
@click.option(
    "--metrics-port",
    default=9003,
    show_default=True,
    type=click.IntRange(1, 65535),
    help="Its HTTP: /metrics, /health.",
)
def up(port: int, metrics_port: int) -> None:
    """Run a mooncake_master on 127.0.0.1 until Ctrl-C, and print the settings that use it.

    For development. It holds no blocks itself: engines lend it memory ([plugin.mooncake] segment_bytes), and blocks last as long as the
    engine whose memory they are in.
    """
    address = f"127.0.0.1:{port}"
    if port == metrics_port:
        raise click.ClickException(f"port {port} cannot serve both; give another with --port or --metrics-port")
    for number, option in ((port, "--port"), (metrics_port, "--metrics-port")):
        if answers(f"127.0.0.1:{number}"):
            raise click.ClickException(f"port {number} of 127.0.0.1 is taken; give another with {option}")
    try:
        command = master_command(port, metrics_port)
    except FileNotFoundError as error:
        raise click.ClickException(f"mooncake_master cannot be started: {error}") from error
    # SIGTERM ends us as Ctrl-C does, so that the master never outlives the command.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with subprocess.Popen(command, env=master_environment(), start_new_session=True) as process:
        try:
            _wait(process, address)
            click.echo(
                f"mooncake_master is ready on {address}, metrics on http://127.0.0.1:{metrics_port}/metrics; Ctrl-C ends it\n"
            )
            click.echo(_settings(address))
            status = process.wait()
            raise click.ClickException(f"mooncake_master ended by itself with status {status}")
        except KeyboardInterrupt:
            click.echo("ending mooncake_master")
        finally:
            _end(process)


def _settings(address: str) -> str:
    return (
        '[use]\nkv_store = "mooncake/store"\n\n[plugin.mooncake]\n'
        f'master = "{address}"\nallow_wildcard_listeners = true    # read "What listens" in the README first\n'
    )


def _wait(process: subprocess.Popen[bytes], address: str) -> None:
    deadline_s = time.monotonic() + _START_S
    while not answers(address):
        if process.poll() is not None:
            raise click.ClickException(f"mooncake_master ended with status {process.returncode} before it was ready")
        if time.monotonic() > deadline_s:
            raise click.ClickException(f"mooncake_master does not answer on {address} after {_START_S:g} s")
        time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
