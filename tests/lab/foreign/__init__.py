"""Runs of other trainers."""
