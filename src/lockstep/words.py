"""Words that users write."""


def is_number(word: str) -> bool:
    """Tell whether a word is a number as Python's float reads it."""
    try:
        float(word)
    except ValueError:
        return False
    return True
