"""A process that builds what another has decided: from the plan alone, without discovery, hooks or choices.

It imports what the plan names, from the distributions and versions that the plan names, or refuses with the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import importlib_metadata

from xllm_core import __version__
from xllm_core.errors import PluginError
from xllm_core.plugins.caches import geometry_of, kv_groups_of
from xllm_core.plugins.contracts.model import ops_of
from xllm_core.plugins.plan import MASKED, AssemblyPlan
from xllm_core.plugins.resolve import Assembly, load_family


def load_plan(plain: Mapping[str, Any], plan_hash: str) -> AssemblyPlan:
    """A plan from `to_json` and the `hash` that its maker announced. Raises PluginError that lists every difference."""
    plan = AssemblyPlan.from_json(plain)
    differences = [*_versions(plan), *_secrets(plan.plugin_settings)]
    if plan.hash != plan_hash:
        differences.append(f"the plan that came has the hash {plan.hash}, announced was {plan_hash}")
    if differences:
        raise PluginError("\n  ".join(["this process cannot load the plan that it was given:", *differences]))
    return plan


def assembly_of(plan: AssemblyPlan) -> Assembly:
    """What the plan names, opened: device, checkpoint, family. Raises PluginError where this machine's family asks for other KV than the plan has."""
    facts = plan.device.build(plan.device_index).facts()
    checkpoint = plan.weight_format.build().open(Path(plan.model_path))
    if checkpoint is None:
        raise PluginError(f"{plan.weight_format.name} does not open {plan.model_path}, which the plan says it does")
    family = load_family(plan.model)
    config = checkpoint.config
    geometry = geometry_of(
        family.attention(config),
        block_size=plan.block_size,
        dtype=plan.dtype,
        kv_layout=plan.kv_layout,
        kv_dtype=plan.kv_dtype,
    )
    if geometry != dict(plan.geometry):
        raise PluginError(f"{plan.model.name} asks for {geometry} here, and the plan has {dict(plan.geometry)}")
    if lacking := {*ops_of(family, config), plan.kv_write} - set(plan.ops):
        raise PluginError(
            f"{plan.model.name} asks here for the ops {', '.join(sorted(lacking))}, which the plan does not have"
        )
    return Assembly(plan, checkpoint, facts, family, family.shape(config), kv_groups_of(family, config, plan))


def _versions(plan: AssemblyPlan) -> Iterable[str]:
    wanted = {(choice.plugin, choice.distribution, choice.version) for choice in plan.choices().values()}
    for plugin, distribution, version in sorted(wanted):
        try:
            here = __version__ if distribution == "xllm-core" else importlib_metadata.version(distribution)
        except importlib_metadata.PackageNotFoundError:
            yield f"plugin {plugin}: the plan has {distribution} {version}, which is not installed here"
            continue
        if here != version:
            yield f"plugin {plugin}: the plan has {distribution} {version}, installed here is {here}"


def _secrets(value: Mapping[str, Any], above: str = "") -> Iterable[str]:
    for key, inner in value.items():
        path = f"{above}.{key}" if above else key
        if isinstance(inner, Mapping):
            yield from _secrets(inner, path)
        elif inner == MASKED:
            yield f'[plugin.{path}] is a secret, which no plan carries; write it as {{ env = "NAME" }}'
