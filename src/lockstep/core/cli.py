"""The ``core`` subcommand: which revision of this repository the doors import."""

import argparse


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``lockstep core``."""
    parser = subparsers.add_parser(
        "core",
        help="say or switch which revision of Lockstep the two doors import",
        description="The core is what trains: `main` is the tree itself, `dev` the commit that .dev.commit names, "
        "checked out in .core/. The switch reaches pretrain_gpt.py, run_recipe.py, `lockstep pretrain-gpt`, "
        "`lockstep train` and `lockstep recipes`; LOCKSTEP_CORE=main|dev chooses for one command.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("status", "say which core is in use, where both lie, and which dependencies differ"),
        ("main", "let the doors import the tree itself"),
        ("dev", "check the commit in .dev.commit out and let the doors import it"),
    ):
        actions.add_parser(name, help=text, description=text.capitalize() + ".").set_defaults(func=_switch)
    pin = actions.add_parser("pin", help="write a revision into .dev.commit")
    pin.add_argument("revision", metavar="REVISION", help="commit, branch or tag of this clone")
    pin.set_defaults(func=_pin)


def _switch(arguments: argparse.Namespace) -> int:
    from lockstep.core.switch import status, switch

    print("\n".join(status() if arguments.action == "status" else switch(arguments.action)))
    return 0


def _pin(arguments: argparse.Namespace) -> int:
    from lockstep.core.switch import pin

    print("\n".join(pin(arguments.revision)))
    return 0
