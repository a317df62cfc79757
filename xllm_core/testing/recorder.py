"""Keeps what each case of a conformance run showed, and refuses to call an empty run green. Registered by `testing.plugin` when asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from xllm_core import __version__
from xllm_core.plugins.specs import API_VERSION
from xllm_core.testing.report import STATIC, ConformanceReport

if TYPE_CHECKING:
    from xllm_core.testing.plugin import Kit

_CONFORMANCE = "xllm_core.testing.conformance"


class Recorder:
    """A pytest plugin for one run."""

    def __init__(self, kit: Kit, path: str | None) -> None:
        self._kit = kit
        self._path = Path(path) if path else None
        self._cases: dict[str, tuple[str, str, bool]] = {}  # node id -> (component, sentence, whether it runs the part)
        self.report = ConformanceReport(kit.plugin_id, core_version=__version__, api_version=API_VERSION)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Know the component and the sentence of every case; tests for which the plugin offers nothing are not there."""
        items[:] = [item for item in items if not _is_empty(item)]
        for item in items:
            if isinstance(item, pytest.Function) and item.module.__name__.startswith(_CONFORMANCE):
                parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
                is_static = item.module.__name__.endswith(".test_static")  # says nothing of what a part does
                components = [value.component for value in parameters if hasattr(value, "component") and not is_static]
                sentence = (item.function.__doc__ or item.name).strip().splitlines()[0]
                is_run = not is_static and item.get_closest_marker("spec_only") is None
                self._cases[item.nodeid] = (components[0] if components else STATIC, sentence, is_run)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a case has ended."""
        if report.nodeid not in self._cases or (report.when != "call" and report.passed):
            return
        component, sentence, is_run = self._cases[report.nodeid]
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            reason = _crash_line(report)
        self.report.component(component).record(
            report.outcome, report.nodeid.split("::", 1)[-1], sentence, reason, is_run=is_run
        )

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Judge, write, and turn a green exit of an empty run into 5, pytest's own "nothing was collected"."""
        report = self.report
        if self._cases:
            record = self._kit.subject.record
            report.distribution, report.version = record.distribution, record.version
            report.device = self._kit.subject.devices_used()
        report.judge()
        if report.problem and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
        if session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not report.problem:
            report.problem = f"pytest ended with status {int(session.exitstatus)}"
        if self._path is not None:
            report.write(self._path)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The verdict, after pytest's own."""
        terminalreporter.section(f"conformance of {self.report.plugin}")
        for component in self.report.components:
            terminalreporter.line(
                f"{component.name}: {component.passed} proven, {component.failed} failed, {component.skipped} skipped"
            )
        if self.report.problem:
            terminalreporter.line(f"NOT GREEN: {self.report.problem}")


def _is_empty(item: pytest.Item) -> bool:
    """A test that was parametrised with nothing."""
    return any(
        str(mark.kwargs.get("reason", "")).startswith("got empty parameter set") for mark in item.iter_markers("skip")
    )


def _crash_line(report: pytest.TestReport) -> str:
    """What went wrong, without the way there."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash is not None else report.longrepr)
    head, _, _ = text.partition("\nassert ")  # what pytest adds on the values compared
    text = head if head != text and not text.startswith("assert ") else text
    return text if len(text) <= 2000 else f"{text[:2000]} ..."
