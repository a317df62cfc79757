"""Its vendor library is not installed."""

from __future__ import annotations

import xllm_vendor_library_that_is_not_installed  # noqa: F401
