"""`xllm plugins check`; it belongs to the kit that it runs."""

from __future__ import annotations

from xllm_core.testing.command import command as command
