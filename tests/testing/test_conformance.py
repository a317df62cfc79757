"""The conformance kit itself: green on the core, red for every planted fault by its name, never green when nothing ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testing.conftest import Install
from xllm_core.testing import ConformanceReport, check_plugin


@pytest.mark.slow
def test_the_core_conforms() -> None:
    """Every suite, on all that the core offers; each kind shows something. Dies with any fault of the core that a suite looks for."""
    report = check_plugin("core")
    assert report.ok, report.text
    kinds = {component.name.partition(" ")[0] for component in report.components if component.passed}
    assert kinds == {
        "attention", "command", "device", "doctor", "kv_store", "logits_processors", "model", "observers", "op", "sampler", "scheduler", "static",
        "weight_format",
    }  # fmt: skip


def test_a_part_of_the_core_conforms() -> None:
    """Without models and devices, which take longest, and a slice of the attention grid."""
    report = check_plugin(
        "core", arguments=("-k", "not test_model and not test_device and not test_attention or float32-D16-S5")
    )
    assert report.ok, report.text
    assert report.component("attention core/paged").passed >= 4
    assert report.component("kv_store core/host").passed >= 10
    assert (report.distribution, report.device.keys()) == ("xllm-core", {"reference"})


FAULTS = {
    ("attention faulty/ignores_window", "test_rows_equal_the_reference", "window"): "differs by",
    ("attention faulty/off_by_one", "test_rows_equal_the_reference", ""): "1 new of 16 tokens (blocks of 8)",
    ("attention faulty/feels_rows", "test_a_row_does_not_feel_its_neighbours", ""): "differs from itself",
    ("op faulty/rounds", "test_it_equals_the_reference", ""): "is rounding",
    ("op faulty/feels_rows", "test_a_row_does_not_feel_its_neighbours", ""): "differs from itself",
    ("op faulty/writes_minus_one", "test_it_equals_the_reference", ""): "kv_write",
    ("op faulty/unheard_of", "test_its_name_means_something", ""): "no op of the core and replaces none",
    ("op faulty/changes_input", "test_it_equals_the_reference", ""): "which it may only read",
    ("device faulty/boaster", "test_allocation", ""): "not zeroed",
    ("model faulty/wrong_eps", "test_logits_equal_transformers", ""): "logits differ",
    ("model faulty/wrong_axis", "test_two_ranks_equal_one", ""): "",
    ("scheduler faulty/starves", "test_nobody_starves", ""): "still waits",
    ("scheduler faulty/drops", "test_orders_name_each_sequence_once", ""): "order of",
    ("scheduler faulty/remembers", "test_it_is_pure", ""): "answers differently",
    ("scheduler faulty/greedy", "test_chunks_stay_in_bounds", ""): "is possible",
    ("scheduler faulty/not_static", "test_it_keeps_its_word", ""): "is_static is True",
    ("sampler faulty/mates", "test_a_row_depends_on_itself_alone", ""): "gets another token",
    ("sampler faulty/too_cold", "test_tokens_are_the_reference_s", ""): "where the reference takes",
    ("logits_processors faulty/foreign_rows", "test_a_row_depends_on_its_own_slot_alone", ""): "the row of slot",
    ("logits_processors faulty/shared_forks", "test_forks_go_separate_ways", ""): "reached its source",
    ("logits_processors faulty/stale_slots", "test_slots_are_used_again", ""): "",
    ("kv_store faulty/flips_a_bit", "test_round_trips_are_bit_exact", ""): "bytes of a block changed",
    ("kv_store faulty/lookup_waits", "test_partial_hits", ""): "lookup() has not returned",
    ("kv_store faulty/start_waits", "test_a_slow_device_blocks_no_call", ""): "start() has not returned",
    ("kv_store faulty/always_hits", "test_partial_hits", ""): "",
    ("static", "test_it_uses_the_public_surface", ""): "imports xllm_core.reference",
}
"""(component, test, part of its parameters) -> words of the failure."""


@pytest.fixture(scope="module")
def faulty(install: Install) -> ConformanceReport:
    """One run over every fault."""
    install("faulty")
    return check_plugin(
        "faulty", arguments=("-k", "not test_features and not (lookup_waits and not partial and not refused)")
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[1]}".replace(" ", "-"))
def test_a_planted_fault_is_red(faulty: ConformanceReport, fault: tuple[str, str, str]) -> None:
    """Each by the name of its part, in the test that speaks of it. Dies with a suite that looks away."""
    component, test, parameters = fault
    found = {name: reason for name, reason in faulty.component(component).failures.items() if name.startswith(test)}
    assert any(parameters in name and FAULTS[fault] in reason for name, reason in found.items()), faulty.text


def test_faults_do_not_spread(faulty: ConformanceReport) -> None:
    """What a fault does not touch stays green: the off-by-one kernel refuses what it does not declare, and so on."""
    assert not faulty.ok
    for component in faulty.components:
        assert component.passed > 0, f"{component.name}: everything fails\n{faulty.text}"


def test_bad_manners_are_red(install: Install) -> None:
    """Importing torch at start, rebinding names of the core and of torch, a target that is not there, settings that take any key."""
    install("rude")
    report = check_plugin("rude", arguments=("-k", "test_static"))
    failures = report.component("static").failures
    assert "importing xllm_rude.plugin loads" in failures["test_importing_it_is_light"]
    assert "torch" in failures["test_importing_it_is_light"]
    for name in ("torch.nn.functional.silu", "xllm_core.engine.policy.Fcfs.chunk", "xllm_core.runtime.noise._GAMMA"):
        assert name in failures["test_it_changes_nobody_else"]
    assert "'Missing'" in failures["test_targets_resolve[scheduler-rude/missing]"]
    assert "test_targets_resolve[scheduler-rude/patches]" not in failures
    assert "accepts unknown keys" in failures["test_settings_have_a_model"]
    assert "policy.py:8 imports xllm_core.engine.policy" in failures["test_it_uses_the_public_surface"]


def test_nothing_ran_is_not_green(install: Install) -> None:
    """A device that is not here is a skip with its reason; with nothing else to try the run is not green, and with a switch it is red."""
    install("absent")
    report = check_plugin("absent")
    assert (report.failed, report.ok) == (0, False)
    assert "no /dev/absent0 on this machine" in report.problem
    for name in ("device absent/absent", "op absent/embedding"):
        assert any("no /dev/absent0" in reason for reason in report.component(name).skips), report.text
    report = check_plugin("absent", require_device=True, arguments=("-k", "test_device"))
    assert "--xllm-require-device" in report.component("device absent/absent").failures["test_facts[absent/absent]"]


def test_on_the_command_line(install: Install, tmp_path: Path) -> None:
    """A table, a report, and an exit status: 0 for green, 1 for red, for nothing and for no such plugin."""
    install("good")

    def check(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "xllm_core.cli", "plugins", "check", *arguments]
        environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    done = check("good", "-k", "test_sampler or test_observer", "--report", "report.json")
    assert done.returncode == 1, "its sampler is greedy whatever is asked, which is not the contract"
    assert "sampler good/greedy" in done.stdout and "NOT GREEN" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["plugin"], report["distribution"], report["version"], report["ok"]) == (
        "good",
        "xllm-good",
        "1.4",
        False,
    )
    observer = next(entry for entry in report["components"] if entry["name"] == "observers good/count")
    assert observer["proven"] == {
        "It takes batches of any size, the empty one too, leaves them as they are, and closes.": 1
    }
    done = check("good", "-k", "test_observer")
    assert done.returncode == 0 and "green: 1 proven" in done.stdout, done.stdout + done.stderr
    done = check("goood")
    assert done.returncode == 1 and "did you mean 'good'" in done.stdout + done.stderr


def test_without_a_plugin_it_says_so() -> None:
    """The suites collected by themselves ask for the option; a plugin that is not installed is named with a guess."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--pyargs",
        "xllm_core.testing.conformance",
        "-p",
        "no:xllm",
        "-p",
        "xllm_core.testing.plugin",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "--xllm-plugin ID" in done.stdout + done.stderr
    report = check_plugin("coer")
    assert not report.ok and "did you mean 'core'" in report.text


def test_a_store_with_a_peer(install: Install) -> None:
    """Killed, restarted and paused by its author's fixture, in real processes; without the fixture everything is skipped with the reason."""
    install("far")
    report = check_plugin("far", arguments=("-k", "test_kv_store or test_static", "-p", "tests.testing.far_peer"))
    assert report.ok, report.text
    store = report.component("kv_store far/store")
    assert store.skipped == 0 and any("peer killed" in sentence for sentence in store.proven), report.text
    report = check_plugin("far", arguments=("-k", "test_kv_store"))
    assert not report.ok and "xllm_store_peer" in report.problem, report.text
