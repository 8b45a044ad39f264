"""How much two runs may differ by rounding where no band was measured."""

import math

_BF16_MANTISSA_BITS = 7
_FLOAT32_EPSILON = 2.0**-23
_LOSS_UNITS, _NORM_UNITS = 16, 64
_FIRST_UPDATE, _GROWTH, _MOST_UPDATES = 4.0, 4.0, 64
"""Where both runs compute in float32: so many epsilons before any update, and so many times as far with each update.

The first one is given more: Adam makes a full step of the smallest gradient, in the direction that rounding may choose.
`python -m tests.lab.calibration.float32` measures correct layouts: at most a sixth of what is allowed here.
"""


def bf16_ulp(value: float) -> float:
    """Return the distance between neighbouring BF16 numbers at ``value``: 0.0625 for a loss in [8, 16)."""
    if value == 0 or not math.isfinite(value):
        return 0.0
    return 2.0 ** (math.frexp(abs(value))[1] - 1 - _BF16_MANTISSA_BITS)


def loss_band(a: float, b: float, updates: int | None = None) -> float:
    """Return half a BF16 ulp of the loss, at the smaller of the two.

    With the number of ``updates`` before it, which says that both runs compute in float32, what that explains if it is
    less: rounding moves a step, the step the weights, and these the next step.
    """
    return _narrowed(bf16_ulp(min(abs(a), abs(b))) / 2, _LOSS_UNITS, a, b, updates)


def norm_band(a: float, b: float, unit: float = 0.0, updates: int | None = None) -> float:
    """Return one BF16 ulp of the gradient norm (0.4% to 0.8% of it), or ``unit``, its last digit, if that is larger.

    A norm sums squares over all gradients, each rounded to BF16 on its way: it is known no better than to one ulp. With
    the number of ``updates`` before it, what float32 explains.
    """
    band = _narrowed(bf16_ulp(min(abs(a), abs(b))), _NORM_UNITS, a, b, updates)
    # 1.5 last digits: two numbers one digit apart differ by it and a rounding error of the subtraction.
    return max(band, 1.5 * unit)


def _narrowed(band: float, units: int, a: float, b: float, updates: int | None) -> float:
    if updates is None:
        return band
    share = units * _FLOAT32_EPSILON * _GROWTH ** min(updates, _MOST_UPDATES) * (_FIRST_UPDATE if updates else 1.0)
    return min(band, share * min(abs(a), abs(b)))
