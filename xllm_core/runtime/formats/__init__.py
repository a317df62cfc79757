"""The weight formats of the core: a Hugging Face directory, a .gguf file, an installed package, the hub. None imports torch to open."""

from __future__ import annotations
