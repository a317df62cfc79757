"""The conformance suites, one module per contract: what a plugin declares is what is tested. See `xllm_core.testing.plugin` for how to run them."""

from __future__ import annotations
