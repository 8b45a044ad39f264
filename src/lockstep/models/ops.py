"""Matrix products and embedding lookup with one rounding rule on every device.

A product of low-precision tensors is accumulated in float32 and rounded once to the operands' dtype, forward and
backward. Devices with fast low-precision matrix units do that natively. Where they are missing the same values come
from float32 products of the converted operands, which is up to hundreds of times faster than the native kernel.

Shape legend: b batch, s sequence, h hidden (input width), o output width, v vocabulary rows.
"""

import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

MatmulMode = Literal["native", "fp32-rounded"]

# A CPU's float32 product is as fast as its low-precision one unless it has matrix units for it (several times
# faster); the gap between the two kinds of machine keeps the choice stable under load.
_CPU_NATIVE_SPEEDUP = 3.0
# On a GPU the native kernel also saves the memory traffic of float32 copies, so only a very slow one is avoided.
_GPU_NATIVE_SPEEDUP = 0.25
_HOPELESS_SPEEDUP = 0.05


def matmul_mode(device: torch.device, dtype: torch.dtype) -> MatmulMode:
    """Return how products of `dtype` tensors are computed on `device`; measured once per process.

    float32 and float64 are always native, and so is the meta device, which computes nothing and stands for a GPU.
    """
    if dtype not in (torch.bfloat16, torch.float16) or device.type == "meta":
        return "native"
    return _measured_mode(str(device), dtype)


@functools.cache
def _measured_mode(device_name: str, dtype: torch.dtype) -> MatmulMode:
    device = torch.device(device_name)
    threshold = _CPU_NATIVE_SPEEDUP if device.type == "cpu" else _GPU_NATIVE_SPEEDUP
    # The small product settles the hopeless case in milliseconds, where the large one would take seconds.
    if _native_speedup(device, dtype, size=96) < _HOPELESS_SPEEDUP:
        return "fp32-rounded"
    return "native" if _native_speedup(device, dtype, size=640) >= threshold else "fp32-rounded"


def _native_speedup(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return how many times faster a native square product is than a float32 one; best of interleaved trials."""
    low = torch.ones(size, size, dtype=dtype, device=device)
    full = low.float()
    native_s, fp32_s = float("inf"), float("inf")
    for _ in range(5):
        native_s = min(native_s, _seconds(lambda: low @ low, device))
        fp32_s = min(fp32_s, _seconds(lambda: full @ full, device))
    return fp32_s / native_s


def _seconds(job: Callable[[], Tensor], device: torch.device) -> float:
    """Return how long a job takes; on a CPU in processor time of one thread, which other processes do not stretch."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        start = time.thread_time()
        job()
        elapsed = time.thread_time() - start
        torch.set_num_threads(threads)
        return elapsed
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    job()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


_TRITON = importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Tell whether Triton kernels run on a device."""
    return _TRITON and device.type == "cuda"


def widened(x: Tensor) -> Tensor:
    """Return x in float32, the least that sums and elementwise functions are computed in; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def given_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Return a scalar without a value whose backward pass begins at x with a gradient of x.

    PyTorch's own way to begin with a gradient imports sympy, to compare shapes.
    """
    return _GivenGradient.apply(x, grad)


class _GivenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
        ctx.given = grad
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.given, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., h] times weight [o, h] transposed, rounded, then plus bias [o], rounded again.

    Models are compiled only where products are native.
    """
    native = torch.compiler.is_compiling() or matmul_mode(x.device, x.dtype) == "native"
    product = F.linear(x, weight) if native else _RoundedLinear.apply(x, weight)
    return product if bias is None else product + bias


class _RoundedLinear(torch.autograd.Function):
    """The three products of a linear layer, each in float32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1]).float()
        return torch.mm(rows, weight.float().t()).to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0]).float()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight.float()).to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mm(grad.t(), x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        return grad_x, grad_weight


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Return the rows of weight [v, h] at ids [b, s]; the gradient adds up in float32 and is rounded once."""
    if ids.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16):
        return _RoundedEmbedding.apply(ids, weight)
    return F.embedding(ids, weight)


class _RoundedEmbedding(torch.autograd.Function):
    """Embedding lookup for CPUs, whose own backward adds up in the dtype of the weight."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight_shape = weight.shape
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        grad = grads[0].reshape(-1, ctx.weight_shape[1])
        used, row_of = torch.unique(ids, return_inverse=True)
        sums = torch.zeros(used.numel(), ctx.weight_shape[1]).index_add_(0, row_of.flatten(), grad.float())
        grad_weight = torch.zeros(ctx.weight_shape, dtype=grad.dtype)
        grad_weight[used] = sums.to(grad.dtype)
        return None, grad_weight
