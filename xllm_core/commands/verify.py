"""`xllm verify`: prove that answers do not depend on what is switched on."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import click

from xllm_core.config import click_options


@click.command("verify")
@click.argument("model")
@click.option(
    "--quick", is_flag=True, help="4 prompts of up to 100 tokens and 16 new, instead of 16 of up to 600 and 64 new."
)
@click.option("--row", "rows", multiple=True, help="Only this row. Repeatable.")
@click.option("--json", "is_json", is_flag=True, help="One JSON object instead of a table.")
@click_options("model", "device", "kv", "log", without=("enable_prefix_cache",))
def command(model: str, quick: bool, rows: tuple[str, ...], is_json: bool, **flags: Any) -> None:
    """Run MODEL with every feature on and off and compare the answers token by token.

    Runs in float32 and bfloat16 unless --dtype says one. Exit code 1 if any row differs or did nothing.
    """
    from xllm_core.testing.verify import FULL, QUICK, ROWS, Row, Verifier

    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise click.UsageError(f"no row {unknown[0]!r}; rows are {', '.join(ROWS)}")
    dtype = flags.pop("dtype", None)
    settings = {key: value for key, value in flags.items() if value not in (None, ())}
    if "use" in settings:
        settings["use"] = dict(pin.split("=", 1) for pin in settings["use"])
    reports = []
    for name in (dtype,) if dtype else ("float32", "bfloat16"):
        verifier = Verifier(model, dtype=name, scale=QUICK if quick else FULL, **settings)
        width = max(len(row) for row in ROWS)

        def show(row: Row, width: int = width) -> None:
            if is_json:
                return
            if row.not_applicable:
                click.echo(f"  {row.feature:<{width}}  not applicable: {row.not_applicable}")
                return
            verdict = "yes" if row.is_identical else "NO"
            state = f"{row.num_compared:>6} of {row.num_tokens} tokens   {row.activity} {row.what}"
            click.echo(f"  {row.feature:<{width}}  {verdict:<3}  {state}{'' if row.has_passed else '   FAILED'}")
            for words in row.differences[:3]:
                click.echo(f"      {words}")

        if not is_json:
            click.echo(f"{name}: feature, identical?, tokens compared, activity")
        report = verifier.run(on_row=show, only=rows)
        reports.append(report)
        if not is_json:
            rule = "to the bit" if report.is_row_invariant else "up to near ties"
            click.echo(f"  {'passed' if report.has_passed else 'FAILED'} on {report.device} ({rule})")
    if is_json:
        click.echo(json.dumps([asdict(report) | {"has_passed": report.has_passed} for report in reports]))
    if not all(report.has_passed for report in reports):
        sys.exit(1)
