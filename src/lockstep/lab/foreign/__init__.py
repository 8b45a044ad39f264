"""Curves and settings of runs that other trainers logged, one small parser a format."""
