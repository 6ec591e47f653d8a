"""GroupNorm and SiLU as one Triton operation, against PyTorch in float64."""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from latent_ae.acceleration import triton_norm
from latent_ae.acceleration.triton_norm import (
    apply_group_norm_silu,
    available,
    group_norm_silu,
    group_norm_silu_backward,
)

EPS = 1e-6
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Case(NamedTuple):
    shape: tuple
    groups: int
    dtype: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32
    channels_last: bool = True
    mean: float = 0.0
    deviation: float = 2.0
    error: float = 1e-5  # of fp32 arithmetic, beside the largest value


CASES = {
    "odd sizes": Case((1, 24, 5, 7), 3),
    "a group for each channel": Case((2, 32, 3, 3), 32),
    "two blocks of channels": Case((2, 160, 5, 7), 5),
    "two chunks, the first of two tiles": Case((1, 24, 17, 19), 2),
    "one pixel": Case((2, 32, 1, 1), 2),
    "not channels_last": Case((2, 24, 5, 7), 3, channels_last=False),
    # A difference of E[x²] and E[x]² would have no digit in common with this variance.
    "a large mean": Case((2, 24, 9, 15), 3, mean=100.0, deviation=0.02, error=1e-3),
    "bf16": Case((2, 24, 5, 7), 3, torch.bfloat16),
    "bf16, weights too": Case((1, 24, 5, 7), 3, torch.bfloat16, torch.bfloat16),
    "fp16": Case((1, 24, 5, 7), 3, torch.float16),
}
ON_GPU = {
    "fp32": Case((2, 128, 250, 130), 32),
    "bf16": Case((2, 128, 250, 130), 32, torch.bfloat16),
    "fp16": Case((2, 96, 33, 47), 32, torch.float16),
    "many tiles a chunk": Case((1, 512, 129, 131), 32, error=3e-5),
    "channels that are no multiple of 16": Case((3, 20, 33, 47), 4, torch.bfloat16),
    "not channels_last": Case((2, 320, 17, 19), 32, channels_last=False),
    "a large mean": Case((2, 128, 64, 64), 32, mean=100.0, deviation=0.02, error=1e-3),
}

# The interpreter has to be chosen before Triton is imported, so this has a process of its own.
# Small limits: small pictures then go through every loop.
CHILD = """
import sys
import torch
from latent_ae.acceleration import triton_norm as norm

norm._CHUNKS, norm._COMBINED = 2, 16
results = {}
for name, (groups, eps, gy, x, weight, bias) in torch.load(sys.argv[1]).items():
    assert norm.available(x)
    y, mean, rstd = norm.group_norm_silu(x, weight, bias, groups, eps)
    again = norm.apply_group_norm_silu(x, weight, bias, mean, rstd)
    gradients = norm.group_norm_silu_backward(gy, x, weight, bias, mean, rstd)
    results[name] = (y, mean, rstd, again, *gradients)
torch.save(results, sys.argv[2])
refused = (x.double(), x[0], x.to("meta"))
assert not any(norm.available(tensor) for tensor in refused)
"""
# `None` in sys.modules: an import of it fails.
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from latent_ae.acceleration import triton_norm
assert not triton_norm.available(torch.zeros(1, 8, 4, 4))
"""


def inputs_of(case, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    channels = case.shape[1]
    x = torch.randn(case.shape, generator=generator) * case.deviation + case.mean
    gy = torch.randn(case.shape, generator=generator)
    if case.channels_last:
        x, gy = (t.contiguous(memory_format=torch.channels_last) for t in (x, gy))
    weight, bias = torch.randn((2, channels), generator=generator).to(device, case.weights)
    return gy.to(device, case.dtype), x.to(device, case.dtype), weight, bias


def run(python, *arguments, **environment):
    command = [sys.executable, "-c", python, *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What Triton's interpreter makes of all cases."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    given = {name: (c.groups, EPS, *inputs_of(c)) for name, c in CASES.items()}
    torch.save(given, folder / "given.pt")
    run(CHILD, folder / "given.pt", folder / "results.pt", TRITON_INTERPRET="1")
    return torch.load(folder / "results.pt")


def assert_close(ours, exact, error, dtype, places=0.5, largest=None):
    """Within the arithmetic's error, a share of the largest value, and the type's last places."""
    assert ours.dtype == dtype
    largest = exact.abs().max() if largest is None else largest
    limit = error * largest + places * ULP[dtype] * exact.abs()
    assert ((ours.double() - exact).abs() <= limit).all()


def assert_right(case, given, results, places=0.5):
    gy, *exact = (tensor.double() for tensor in given)
    for tensor in exact:
        tensor.requires_grad_()
    y, mean, rstd, again, gx, gweight, gbias = results
    wanted = F.silu(F.group_norm(exact[0], case.groups, exact[1], exact[2], EPS))
    gradients = torch.autograd.grad(wanted, exact, gy)
    for ours, right in ((y, wanted), (gx, gradients[0])):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert_close(ours, right.detach(), case.error, case.dtype, places)
    for ours, right in ((gweight, gradients[1]), (gbias, gradients[2])):
        assert_close(ours, right, case.error, case.weights)
    grouped = exact[0].detach().unflatten(1, (case.groups, -1)).flatten(2)
    variance, average = torch.var_mean(grouped, -1, correction=0)
    # A mean may be nothing beside the values that it is of.
    assert_close(mean, average, case.error, torch.float32, largest=case.deviation)
    assert_close(rstd, (variance + EPS).rsqrt(), case.error, torch.float32)
    assert torch.equal(y, again)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_float64(name, interpreted):
    # A whole place: the interpreter cuts bf16 off, where GPUs round to the nearest.
    assert_right(CASES[name], inputs_of(CASES[name]), interpreted[name], places=1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_on_cuda_too_and_the_same_each_time(name):
    case = ON_GPU[name]
    gy, *given = inputs_of(case, "cuda")
    assert available(given[0])

    def all_results():
        y, mean, rstd = group_norm_silu(*given, case.groups, EPS)
        again = apply_group_norm_silu(*given, mean, rstd)
        return y, mean, rstd, again, *group_norm_silu_backward(gy, *given, mean, rstd)

    first = all_results()
    assert_right(case, (gy, *given), first)
    assert all(torch.equal(one, other) for one, other in zip(first, all_results(), strict=True))


def type_of(value):
    """The type of a kernel's argument, as a launch finds it."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "constexpr" if value == 1 else "i32"


@pytest.mark.parametrize("name", ["odd sizes", "bf16, weights too", "one pixel"])
def test_the_kernels_compile_for_cuda(name, monkeypatch, tmp_path):
    """The interpreter takes more than the compiler does, which needs no GPU."""
    pytest.importorskip("triton")
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = []

    def compile_instead(name, grid, *arguments, num_warps=4, **blocks):
        kernel = getattr(triton_norm._kernels(), name)
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | blocks
        assert list(values) == kernel.arg_names
        signature = {key: type_of(value) for key, value in values.items()}
        signature |= dict.fromkeys(blocks, "constexpr")
        constants = {key: values[key] for key, kind in signature.items() if kind == "constexpr"}
        source = ASTSource(kernel, signature, constants)
        options = {"num_warps": num_warps, "enable_fp_fusion": True}
        code = triton_compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        compiled.append((name, len(code.asm["cubin"]) > 0))

    monkeypatch.setattr(triton_norm, "_launch", compile_instead)
    gy, *given = inputs_of(CASES[name])
    _, mean, rstd = group_norm_silu(*given, CASES[name].groups, EPS)
    group_norm_silu_backward(gy, *given, mean, rstd)
    names = ("statistics", "combine", "apply", "gradient_sums", "input_gradient")
    assert compiled == [(name, True) for name in names]


def test_a_cpu_without_the_interpreter_has_to_do_otherwise(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not available(torch.zeros(1, 8, 4, 4))


def test_the_module_can_be_imported_without_triton():
    run(WITHOUT_TRITON, TRITON_INTERPRET="1")


def test_groups_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match="8 channels do not make 3 groups"):
        group_norm_silu(torch.zeros(1, 8, 4, 4), torch.ones(8), torch.zeros(8), 3, EPS)
