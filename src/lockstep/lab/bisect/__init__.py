"""Bisecting a history for the commit that moved a loss curve."""
