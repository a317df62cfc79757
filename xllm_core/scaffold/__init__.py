"""What `xllm plugins new` writes: templates of distributions, and the code that fills them in."""

from __future__ import annotations
