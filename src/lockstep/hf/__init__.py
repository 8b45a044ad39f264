"""Hugging Face weights and configurations, both ways; each family is declared once, in ``families``."""

SHARD_BYTES = 5 * 1000**3
"""Size of the safetensors files that are written, unless another is asked for: that of transformers."""
