"""How much two runs may differ by rounding where no band was measured."""

import math

_BF16_MANTISSA_BITS = 7


def bf16_ulp(value: float) -> float:
    """Return the distance between neighbouring BF16 numbers at ``value``: 0.0625 for a loss in [8, 16)."""
    if value == 0 or not math.isfinite(value):
        return 0.0
    return 2.0 ** (math.frexp(abs(value))[1] - 1 - _BF16_MANTISSA_BITS)


def loss_band(a: float, b: float) -> float:
    """Return half a BF16 ulp of the loss, at the smaller of the two."""
    return bf16_ulp(min(abs(a), abs(b))) / 2


def norm_band(a: float, b: float, unit: float = 0.0) -> float:
    """Return one BF16 ulp of the gradient norm (0.4% to 0.8% of it), or ``unit``, its last digit, if that is larger.

    A norm sums squares over all gradients, each rounded to BF16 on its way: it is known no better than to one ulp.
    """
    band = bf16_ulp(min(abs(a), abs(b)))
    # 1.5 last digits: two numbers one digit apart differ by it and a rounding error of the subtraction.
    return max(band, 1.5 * unit)
