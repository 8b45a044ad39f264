"""Lockstep: train GPT-style models through two front doors and prove two runs are the same run."""

__version__ = "0.1.0"
