"""What rounding does to a run: measured, kept beside its record, and used by verdicts."""
