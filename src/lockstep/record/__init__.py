"""The run record: what a run writes about itself, and the reader of it."""

from lockstep.record.paths import create_run_dir
from lockstep.record.reader import Run, load_run
from lockstep.record.schema import SCHEMA, EvaluationLine, TrainLine
from lockstep.record.writer import RunWriter

__all__ = ["SCHEMA", "EvaluationLine", "Run", "RunWriter", "TrainLine", "create_run_dir", "load_run"]
