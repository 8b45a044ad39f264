"""Spelling of iterations in sentences."""


def spans(iterations: list[int]) -> str:
    """Spell iterations: ``iteration 4 is`` or ``iterations 8 to 10 are`` or ``iterations 3, 5 and 7 more are``."""
    if len(iterations) == 1:
        return f"iteration {iterations[0]} is"
    if iterations == list(range(iterations[0], iterations[-1] + 1)):
        return f"iterations {iterations[0]} to {iterations[-1]} are"
    if len(iterations) == 2:
        return f"iterations {iterations[0]} and {iterations[1]} are"
    return f"iterations {iterations[0]}, {iterations[1]} and {len(iterations) - 2} more are"
