"""Memory of a run, and the layouts it could have, before anything is launched."""
