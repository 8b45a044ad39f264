"""The argument parser of both doors."""

import argparse
from typing import NoReturn

from lockstep.errors import ConfigError


class StrictParser(argparse.ArgumentParser):
    """Guesses no abbreviations, and raises ``ConfigError`` where argparse would end the program."""

    def __init__(self, *, help_column: int, **options: object) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=help_column, width=110),
            **options,  # type: ignore[arg-type]
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of ending the program."""
        raise ConfigError(message)
