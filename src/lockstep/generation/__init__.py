"""Text from a model: what ``lockstep generate`` does, as Python calls."""
