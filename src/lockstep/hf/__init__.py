"""Hugging Face weights and configurations, both ways; each family is declared once, in ``families``."""
