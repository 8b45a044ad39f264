"""Why options are accepted or refused, where several sections of the tree give the same reason."""

NARROW_FORMATS = "of narrow formats only float8 with a scale for each tensor or row is supported"
OWN_GRAPHS = "Lockstep captures graphs of its own where they pay; see --cuda-graphs"
