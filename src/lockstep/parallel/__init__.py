"""Layouts: how one run is spread over processes, applied to the single-device model from outside."""

from lockstep.parallel.apply import parallelize
from lockstep.parallel.mesh import Axis, Mesh, start_processes

__all__ = ["Axis", "Mesh", "parallelize", "start_processes"]
