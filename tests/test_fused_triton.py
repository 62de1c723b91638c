"""The Triton kernel: run by the interpreter, compiled without a GPU, and what only a GPU shows."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from one_pass_triton import BF16, F16, F32, INT8, TENSORS, copy_of, launch, row_of

from nomadam.optimizers import sgd_sai_triton
from nomadam.optimizers.sgd_sai_triton import triton_available, triton_fits

pytestmark = pytest.mark.skipif(not triton_available(), reason="needs Triton")
CASES = str(Path(__file__).with_name("triton_cases.py"))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("machine", ["interpreter", pytest.param("gpu", marks=needs_cuda)])
def test_cases(machine):
    """Those of triton_cases.py: the interpreter has to be chosen before Triton is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["TRITON_INTERPRET"] = "1" if machine == "interpreter" else "0"
    options = ["-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, CASES],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " failed" not in done.stdout


# ------------------------------------------------------------------------ compiled without a GPU


class Machine:
    """A driver that knows its GPU's architecture, and has none."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """Stands in for the kernel: compiles what would be launched, and keeps it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def compile_it(*arguments, **options):
            self.last = self.kernel.warmup(*arguments, grid=grid, **options)

        return compile_it


@pytest.fixture
def compiled_for(monkeypatch):
    """A function from an architecture to what launches give there."""
    import triton
    from triton.backends.compiler import GPUTarget

    from nomadam.optimizers import sgd_sai_triton_kernels as kernels

    kernel = kernels.update_rows

    def choose(architecture):
        amd = isinstance(architecture, str)
        target = GPUTarget(*("hip", architecture, 64) if amd else ("cuda", architecture, 32))
        monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        compiled = Compiled(kernel)
        monkeypatch.setattr(kernels, "update_rows", compiled)
        monkeypatch.setattr(triton.runtime.driver, "_active", Machine(target))
        return compiled

    monkeypatch.setattr(sgd_sai_triton, "_tables", {})
    return choose


def rows_of(*kinds, **options):
    return [copy_of(row_of(3000, *kind, seed=i, **options), "cpu") for i, kind in enumerate(kinds)]


def test_new_numbers_and_addresses_do_not_compile_again(compiled_for):
    compiled = compiled_for(90)
    rows = rows_of((F32, F32, F32))
    launch(rows)
    first = compiled.last
    for lr, momentum, weight_decay in ((1, 0.95, 0), (0.0, 0.6, 1.0), (16.0, 0.999, 1e-30)):
        launch(rows, lr=lr, momentum=momentum, weight_decay=weight_decay)
        assert compiled.last is first
    for step, gain in ((1, 1), (16, 0.0), (2**32 - 1, torch.tensor(3.0))):
        others = [*rows, *rows_of((F32, F32, F32))]
        changed = {"draw": rows[0]["draw"]._replace(step=step), "gain": gain}
        launch([row | changed for row in others])
        assert compiled.last is first
    places = torch.zeros(5)
    launch(rows, lr=places[0])
    with_tensor = compiled.last
    launch(rows, lr=places[1])
    assert compiled.last is with_tensor is not first


@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles_to_vectors_for_nvidia(compiled_for, architecture):
    compiled = compiled_for(architecture)
    launch(rows_of((F32, F32, F32)))
    code = compiled.last.asm["ptx"]
    per_thread = sgd_sai_triton.TILE // (32 * 8 * 4)  # of 16 bytes, in each tensor
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", code)) == 3 * per_thread
    assert len(re.findall(r"st\.global\S*\.v4\.b32", code)) == 2 * per_thread
    assert "shared" not in code.split(".entry", 1)[1]  # no element changes threads
    launch(rows_of((BF16, BF16, INT8)), lr=torch.tensor(0.1), keep=torch.tensor(True))
    code = compiled.last.asm["ptx"]
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", code)) == 2  # 8 elements of two tensors
    assert len(re.findall(r"ld\.global\S*\.v2\.b32", code)) == 1  # 8 codes


def test_compiles_to_vectors_for_amd(compiled_for):
    compiled = compiled_for("gfx942")
    launch(rows_of((F32, F32, F32), (BF16, BF16, INT8)), grad_scale=torch.tensor(2.0))
    code = compiled.last.asm["amdgcn"]
    per_thread = sgd_sai_triton.TILE // (64 * 4 * 4)
    assert len(re.findall(r"(?:buffer|global)_load_dwordx4", code)) == 3 * per_thread + 2
    assert "vgpr_spill_count: 0" in code


def test_many_kinds_compile_together(compiled_for):
    compiled = compiled_for(90)
    floats = (F32, BF16, F16)
    launch(rows_of(*((a, b, None) for a in floats for b in floats)), momentum=0.0)
    assert compiled.last.asm["ptx"]


# ---------------------------------------------------------------------------------------- a GPU


def test_takes_nothing_on_the_host():
    row = row_of(8)
    assert not triton_fits([row["param"], row["grad"], row["momentum_buffer"], None, None])


@needs_cuda
def test_what_it_takes():
    x = torch.zeros(8, 8, device="cuda")
    assert triton_fits([x, x.half(), x.bfloat16(), None, None])
    assert triton_fits([x, x, x.to(INT8), torch.zeros(1, device="cuda"), None])
    assert triton_fits([torch.nn.Parameter(x), x, None, None, None])
    for wrong in (x.t()[1:], x.double(), x.cpu(), torch._neg_view(x)):
        assert not triton_fits([wrong, x, x, None, None])
        assert not triton_fits([x, wrong, x, None, None])
        assert not triton_fits([x, x, wrong, None, None])


def rows_on_gpu(step=7):
    kinds = [(F32, F32, F32), (BF16, BF16, INT8), (F16, F16, F32), (BF16, BF16, BF16)]
    rows = [row_of(50_000 + i, *kind, seed=i) for i, kind in enumerate(kinds)]
    rows.append(row_of(3000, BF16, F32, BF16, kahan=True, seed=9))
    rows = [copy_of(row, "cuda") for row in rows]
    for row in rows:
        row["draw"] = row["draw"]._replace(step=step)
    return rows


def assert_equal(rows, wanted):
    for a, b in zip(rows, wanted, strict=True):
        for name in TENSORS:
            assert a[name] is None if b[name] is None else a[name].equal(b[name])


def new_gradients(rows):
    for row in rows:
        row["grad"] = torch.randn_like(row["grad"])


@needs_cuda
def test_a_step_never_waits():
    rows, lr = rows_on_gpu(), torch.tensor(0.1, device="cuda")
    keep, grad_scale = torch.tensor(True, device="cuda"), torch.tensor(8.0, device="cuda")
    launch(rows, lr=lr, keep=keep, grad_scale=grad_scale)
    launch(rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            new_gradients(rows)
            rows[0]["gain"] = 1.0 + step
            launch(rows, lr=lr, keep=keep, grad_scale=grad_scale)
            launch(rows, lr=0.1 * step)
            launch(rows[:2])  # a table of its own
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("own_gradients", [False, True])
def test_captured_step_equals_steps(own_gradients):
    """With gradients that were there before, and with some that the graph allocates."""
    step, lr = torch.tensor(7, device="cuda"), torch.tensor(0.1, device="cuda")
    keep = torch.tensor(True, device="cuda")
    rows, wanted = rows_on_gpu(step), rows_on_gpu()
    given = [row["grad"].clone() for row in rows]

    def one_step():
        for row, grad in zip(rows, given, strict=True):
            row["grad"] = grad * 1 if own_gradients else grad
        launch(rows, lr=lr, keep=keep)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        one_step()
    torch.cuda.current_stream().wait_stream(side)
    launch(wanted, lr=float(lr))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_step()
    assert_equal(rows, wanted)  # a capture does nothing
    others = rows_on_gpu()
    for i in range(4):
        lr.fill_(0.1 / (i + 1)), step.fill_(20 + i), keep.fill_(i != 2)
        for row, grad in zip(wanted, given, strict=True):
            grad.copy_(torch.randn_like(grad))
            row["grad"] = grad
            row["draw"] = row["draw"]._replace(step=20 + i)
        graph.replay()
        if i != 2:
            launch(wanted, lr=float(lr))
        assert_equal(rows, wanted)
        for row in rows:  # steps outside the graph, with other gradients, must not disturb it
            row["grad"] = torch.zeros_like(row["grad"])
        launch(rows, lr=0.0, weight_decay=0.0, keep=torch.tensor(False, device="cuda"))
        launch(others)


@needs_cuda
def test_more_elements_than_an_int32_counts():
    numel = 2**31 + 3000
    if torch.cuda.mem_get_info()[0] < 7 * numel:
        pytest.skip("needs 14 GiB")
    whole = copy_of(row_of(128, BF16, BF16, INT8), "cuda")
    cut = 2**31 - 2**20
    whole["param"] = torch.ones(numel, dtype=BF16, device="cuda")
    whole["grad"] = torch.full((numel,), 0.3, dtype=BF16, device="cuda")
    whole["momentum_buffer"] = torch.full((numel,), 50, dtype=INT8, device="cuda")
    whole["momentum_scale"] = torch.ones(-(-numel // 128), device="cuda")
    piece = {**whole, "draw": whole["draw"]._replace(first=cut)}
    for name in ("param", "grad", "momentum_buffer"):
        piece[name] = whole[name][cut:].clone()
    piece["momentum_scale"] = whole["momentum_scale"][cut // 128 :].clone()
    launch([whole])
    launch([piece])
    for name in ("param", "momentum_buffer"):
        assert whole[name][cut:].equal(piece[name])
