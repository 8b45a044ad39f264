"""Single-device model code: no process group, no global state; a model builds and runs in a plain interpreter."""

from lockstep.models.decoder import GPTModel
from lockstep.models.dropout import DropoutStreams
from lockstep.models.init import build_model, fingerprint

__all__ = ["DropoutStreams", "GPTModel", "build_model", "fingerprint"]
