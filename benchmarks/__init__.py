"""Programs that measure: each is run by itself, and says in its docstring what it finds."""
