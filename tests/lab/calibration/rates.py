"""Both error rates of the measured band, by its factor: ``python -m tests.lab.calibration.rates``.

Clean pairs are runs that may differ by rounding only and that the band was not made from: other perturbations, other
micro-batch sizes, the repeat. Faults are those of ``tests/lab/faults.py`` that one process can have in one run. A pair
is called a bug where any loss or gradient norm lies outside the band.
"""

import contextlib
import io
from typing import Any

import torch

from lockstep.lab.bands import loss_band, norm_band
from lockstep.lab.calibration.band import QUANTITIES, Band, Curve, measure
from lockstep.lab.calibration.worker import Job, train
from lockstep.lab.localise.worker import config_of
from lockstep.parallel import Mesh
from tests.lab.faults import FAULTS, KINDS, config

FACTORS = (0.0, 2.0, 3.0, 4.0, 6.0, 8.0)
ITERATIONS = 12
BAND_SEEDS, OTHER_SEEDS = range(1, 5), range(101, 113)
PRECISIONS: dict[str, dict[str, Any]] = {"float32": {}, "bfloat16": {"mixed_precision.bf16": True}}


def curve(changes: dict[str, Any], seed: int | None = None) -> Curve:
    """Return losses and gradient norms of a run in this process."""
    tree = config({**changes, "train.train_iters": ITERATIONS})
    with contextlib.redirect_stdout(io.StringIO()):
        lines = train(config_of(tree), torch.device("cpu"), Mesh(), Job("", tree, ITERATIONS, "", seed))
    return {line["iteration"]: line for line in lines}


def outside(base: Curve, other: Curve, band: Band, float32: bool = False) -> bool:
    """Tell whether any number of a pair lies outside the band."""
    for iteration, values in base.items():
        for quantity in QUANTITIES:
            a, b = values[quantity], other[iteration][quantity]
            assert a is not None
            width = band.width(quantity, iteration, a)
            if band.factor == 0 and b is not None:  # As where no band is measured.
                updates = iteration - 1 if float32 else None
                width = loss_band(a, b, updates) if quantity == "lm_loss" else norm_band(a, b, 0.0, updates)
            if b is None or width is None or not abs(a - b) <= width:
                return True
    return False


def main() -> None:
    """Print a line for every factor, and the faults that the chosen ones miss."""
    false = dict.fromkeys(FACTORS, 0)
    missed: dict[float, list[str]] = {factor: [] for factor in FACTORS}
    clean_pairs = faults = 0
    for kind, changes in KINDS.items():
        for precision, extra in PRECISIONS.items():
            settings = {**changes, **extra}
            base = curve(settings)
            spread = measure(base, [curve(settings, seed) for seed in BAND_SEEDS])
            clean = [curve(settings, seed) for seed in OTHER_SEEDS] + [curve(settings)]
            clean += [curve({**settings, "train.micro_batch_size": size}) for size in (2, 4)]
            clean_pairs += len(clean)
            planted = {}
            for name, fault in FAULTS.items():
                if fault.processes == 1 and fault.kind == kind and not fault.trains_first:
                    try:
                        with fault.plant():
                            planted[name] = curve({**settings, **fault.layout})
                    except Exception as error:
                        print(f"not run: {name}: {type(error).__name__}: {error}")
            faults += len(planted)
            for factor in FACTORS:
                band = Band(spread, factor, [], True)
                false[factor] += sum(outside(base, other, band, precision == "float32") for other in clean)
                missed[factor] += [
                    f"{precision} {n}" for n, c in planted.items() if not outside(base, c, band, precision == "float32")
                ]
    for factor in FACTORS:
        title = f"factor {factor:g}" if factor else "no band"
        print(f"{title}: {false[factor]} of {clean_pairs} clean pairs outside, ", end="")
        print(f"{len(missed[factor])} of {faults} faults inside ({', '.join(missed[factor])})")


if __name__ == "__main__":
    main()
