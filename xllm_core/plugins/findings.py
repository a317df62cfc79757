"""Runs the checks of `xllm_doctor`: one that raises, or answers something else, is itself a finding."""

from __future__ import annotations

from typing import Any

from xllm_core.plugins.contracts.doctor import Finding
from xllm_core.plugins.plan import describe, load_target


def findings_of(name: str, spec: Any) -> list[Finding]:
    """What one check finds. name: "plugin/name", for a check that fails by itself."""
    try:
        found = list(load_target(spec.target, owner=name)(**spec.options))
    except KeyboardInterrupt:
        raise  # that was the user
    except BaseException as error:  # noqa: BLE001  the other checks still have something to say
        return [Finding("warn", name, f"this check failed: {describe(error)}", "tell the plugin's authors")]
    strange = [type(finding).__name__ for finding in found if not isinstance(finding, Finding)]
    if strange:
        return [Finding("warn", name, f"this check gives {strange[0]}, not Finding", "tell the plugin's authors")]
    return found
