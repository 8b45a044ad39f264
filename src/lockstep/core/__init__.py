"""Core versions: which revision of this repository the two doors import."""
