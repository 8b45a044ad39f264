"""``lockstep recipes``: the recipes with their sizes, layouts and, when asked, what they need of each GPU."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.arguments import StrictParser
from lockstep.config.derive import derive, interpolate
from lockstep.errors import UserError
from lockstep.plan.gpus import GIB, Gpu, gpu_type, known_gpus
from lockstep.plan.layouts import layout_of
from lockstep.recipes.catalog import find_recipe
from lockstep.recipes.registry import RECIPES, Recipe
from lockstep.recipes.size import count_parameters, count_trained

_UNKNOWN = "-"


@dataclass(frozen=True)
class Entry:
    """What the list says of a recipe.

    Attributes:
        parameters: of the whole model; None where the recipe gives no size.
        trained: parameters that are trained, likewise.
        tokens: consumed by an optimizer step.
        gpus: that its layout is made for.
        layout: sizes of the axes.
    """

    parameters: int | None
    trained: int | None
    tokens: int | None
    gpus: int
    layout: str


def entry_of(recipe: Recipe) -> Entry:
    """Return what is to be said of a recipe; nothing is validated, so that it works for what cannot run yet."""
    config = recipe.build()
    interpolate(config)
    derive(config, recipe.gpus)
    batch, length = config.train.global_batch_size, config.model.seq_length
    tokens = batch * length if batch and length else None
    return Entry(
        parameters=count_parameters(config.model),
        trained=count_trained(config.model, config.peft),
        tokens=tokens,
        gpus=recipe.gpus,
        layout=str(layout_of(config, recipe.gpus)),
    )


def main(argv: Sequence[str]) -> int:
    """Print the recipes; return the exit code.

    Raises:
        UserError: an unknown recipe or GPU.
    """
    options = _parser().parse_args(argv)
    if options.gpu is not None and not options.memory:
        raise UserError(f"--gpu {options.gpu} says on what --memory is measured; add --memory")
    gpu = gpu_type(options.gpu or "h100") if options.memory else None
    recipes = [find_recipe(name) for name in options.names] or [found for _, found in sorted(RECIPES.items())]
    rows = [
        ["recipe", "parameters", "trained", "tokens/step", "GPUs", "layout"] + ([f"GiB of {gpu.name}"] if gpu else [])
    ]
    notes = []
    for recipe in recipes:
        entry = entry_of(recipe)
        sizes = [size_text(entry.parameters), size_text(entry.trained)]
        row = [recipe.name, *sizes, number_text(entry.tokens), str(entry.gpus), entry.layout]
        if gpu:
            needed, why = _memory(recipe, gpu)
            row.append(needed)
            notes += [f"{recipe.name}: {why}"] if why else []
        rows.append(row)
    print("\n".join([*_aligned(rows), *notes]))
    return 0


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = (1, 2, 3, 4)
    return [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _parser() -> argparse.ArgumentParser:
    parser = StrictParser(
        prog="lockstep recipes",
        help_column=24,
        description="List the recipes: parameters, tokens of an optimizer step, and the layout on the GPUs that it "
        "is made for.",
    )
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="recipes to list (default: all)")
    parser.add_argument(
        "--memory", action="store_true", help="also what each GPU needs at the peak, measured as `lockstep plan` does"
    )
    parser.add_argument("--gpu", metavar="TYPE", help=f"with --memory: {', '.join(known_gpus())} (default: h100)")
    return parser


def _memory(recipe: Recipe, gpu: Gpu) -> tuple[str, str]:
    """Return the peak in GiB and whether it fits, and why it is not known where it is not."""
    from lockstep.plan.planner import Planner

    try:
        answer = Planner(recipe.build(), gpu).ask(recipe.gpus)
    except UserError as error:
        problems = getattr(error, "problems", [str(error)])
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return _UNKNOWN, problems[0] + more
    fits = "fits" if answer.fits else "does not fit"
    return f"{answer.memory.peak_bytes / GIB:.1f} {fits}", ""


def size_text(parameters: int | None) -> str:
    """Return a number of parameters as names of models have it."""
    if parameters is None:
        return _UNKNOWN
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def number_text(value: int | None) -> str:
    """Return a number with its thousands apart."""
    return _UNKNOWN if value is None else f"{value:,}"
