"""Parts that are each wrong in one way. The conformance kit must find every one of them."""

from __future__ import annotations
