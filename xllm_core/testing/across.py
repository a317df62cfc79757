"""One model on two devices: what a device says, judged by what the reference says."""

from __future__ import annotations

from collections.abc import Mapping

from xllm_core.testing.verify import MARGINS, QUICK, Outcome, Row, Scale, Verifier

_ROOM = {"memory_bytes": 1 << 24}


def compare_with_reference(
    model: str, use: Mapping[str, str], *, dtype: str = "float32", plugin: Mapping[str, object] | None = None, scale: Scale = QUICK
) -> Row:  # fmt: skip
    """Run the requests of the matrix plainly on the device that `use` pins, and on the reference in float32; the comparison, as one row.

    A difference is excused where the reference's own candidates nearly tie, by the margin of `dtype`: two devices round differently.
    In bfloat16 take a calm model: one whose logits are spread wide (initializer_range 0.5) drifts by more, on the reference itself.
    """
    mine = Verifier(model, dtype=dtype, scale=scale, use=dict(use), plugin=dict(plugin or {}), **_ROOM)
    truth: Verifier | None = None
    try:
        mine.begin()
        # The device may have fitted the scale to its blocks: both are asked the same.
        truth = Verifier(model, dtype="float32", scale=mine.scale, use={"device": "core/reference"}, **_ROOM)
        truth.begin()
        return truth.judge(
            "tokens of the reference", Outcome(mine.baseline, len(mine.baseline), "sequences"), MARGINS[dtype]
        )
    finally:
        mine.close()
        if truth is not None:
            truth.close()
