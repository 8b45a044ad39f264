"""Running out of memory is one short error."""

import pytest
import torch

from lockstep.errors import UserError
from lockstep.training.memory import told_when_full

CPU = torch.device("cpu")
_CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 14.75 MiB is "
    "free. Including non-PyTorch memory, this process has 79.08 GiB memory in use. Of the allocated memory 70 GiB is"
)


def test_a_cpu_that_has_no_more() -> None:
    with (
        pytest.raises(UserError, match=r"^out of memory on cpu while training: 4194304.0 GiB were asked for at once; "),
        told_when_full(CPU, "training"),
    ):
        torch.empty(1 << 52, dtype=torch.uint8)
    with pytest.raises(UserError, match="the system gives no more; `lockstep plan`"), told_when_full(CPU, "training"):
        bytearray(1 << 62)


def test_a_gpu_that_has_no_more() -> None:
    with pytest.raises(UserError) as caught, told_when_full(torch.device("cuda:0"), "setting up"):
        raise torch.OutOfMemoryError(_CUDA)
    assert str(caught.value) == (
        "out of memory on cuda:0 while setting up: 2.00 GiB were asked for, 14.75 MiB of 79.10 GiB are free; "
        "`lockstep plan` tells what a command needs, in which layouts it fits and what saves most"
    )
    with pytest.raises(UserError, match="up: CUDA driver error; `lockstep"), told_when_full(CPU, "setting up"):
        raise torch.OutOfMemoryError("CUDA driver error\nmore of it")


def test_graphs_are_told_of() -> None:
    with (
        pytest.raises(UserError, match="are free; --cuda-graphs none needs less, and `lockstep plan` tells"),
        told_when_full(torch.device("cuda:0"), "training", graphs=True),
    ):
        raise torch.OutOfMemoryError(_CUDA)


def test_other_errors_stay() -> None:
    with pytest.raises(RuntimeError, match="shapes"), told_when_full(CPU, "training"):
        raise RuntimeError("shapes")
