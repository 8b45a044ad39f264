"""The command ``pretrain_gpt.py``: flags in, a run out."""

from collections.abc import Sequence

from lockstep.launch import launch
from lockstep.megatron_lm.parser import build_parser, parse_flags


def main(argv: Sequence[str]) -> int:
    """Train as Megatron-LM's flags say; return the exit code.

    Raises:
        UserError: flags that cannot be taken, or a run that cannot start.
    """
    config = parse_flags(argv)
    instead = vars(build_parser().parse_known_args(argv)[0])
    return launch(
        config,
        door="megatron_lm",
        name="pretrain_gpt",
        argv=argv,
        print_only=instead.get("print_config", False),
        show_samples=instead.get("show_samples"),
    )
