"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys


def xllm(
    *arguments: str, code: str = "from xllm_core.cli import main; sys.exit(main())"
) -> subprocess.CompletedProcess[str]:
    """Run `xllm`; `code` lets a test look inside."""
    command = [sys.executable, "-c", f"import sys; {code}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_lists_commands_and_imports_nothing_heavy() -> None:
    """No torch, no transformers, no pydantic. Dies if help imports a command, or a command list grows an import."""
    look = "from xllm_core.cli import main; s = main(); print(sorted(m for m in sys.modules if m in HEAVY), file=sys.stderr); sys.exit(s)"
    done = xllm("--help", code=f"HEAVY = ('torch', 'transformers', 'pydantic', 'numpy', 'tokenizers'); {look}")
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    for line in (
        "chat Talk to a model in the terminal.",
        "config Show every setting",
        "plugins List plugins",
        "--version",
    ):
        assert line in " ".join(done.stdout.split()), done.stdout


def test_help_is_quick() -> None:
    """Under 0.3 s of processor time: the best of five. Wall time would measure who else uses the machine."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert xllm("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3, times


def test_version() -> None:
    """Equals the package's."""
    from xllm_core import __version__

    assert xllm("--version").stdout.strip() == f"xllm, version {__version__}"


def test_an_unknown_command_names_the_nearest() -> None:
    """Wrong usage is status 2, on stderr."""
    done = xllm("chatt")
    assert done.returncode == 2
    assert "no command 'chatt'; did you mean 'chat'?" in done.stderr
    assert done.stdout == ""


def test_errors_of_ours_are_one_message_and_status_1() -> None:
    """No traceback. Dies if XllmError escapes main."""
    done = xllm("plugins", "why", "atention")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: unknown kind 'atention'; did you mean 'attention'?")
    assert "Traceback" not in done.stderr


def test_an_interrupt_is_status_130() -> None:
    """Ctrl-C inside a command. Dies if it ends in a traceback or as status 1."""
    raising = "import xllm_core.commands.plugins as p; p.command.callback = lambda: (_ for _ in ()).throw(KeyboardInterrupt())"
    done = xllm("plugins", "list", code=f"{raising}; from xllm_core.cli import main; sys.exit(main())")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_errors_we_did_not_expect_keep_their_traceback() -> None:
    """A bug must stay findable. Dies if main swallows everything."""
    raising = "import xllm_core.commands.plugins as p; p.command.callback = lambda: 1 / 0"
    done = xllm("plugins", "list", code=f"{raising}; from xllm_core.cli import main; sys.exit(main())")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_plugins_list_json() -> None:
    """One JSON array; with --why the core's parts in it, each with what it declares."""
    found = json.loads(xllm("plugins", "list", "--json").stdout)
    assert (found[0]["id"], found[0]["state"], found[0]["parts"]) == ("core", "found", {})
    loaded = json.loads(xllm("plugins", "list", "--why", "--json").stdout)
    assert loaded[0]["state"] == "loaded"
    assert loaded[0]["parts"]["xllm_ops"]["rms_norm"]["devices"] == ["reference"]
    assert "core  found  xllm-core" in xllm("plugins", "list").stdout
