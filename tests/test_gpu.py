"""What only a GPU can show. Skipped without one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import peak_bytes
from tests.test_accelerate import accelerate_launch, forget_after, same_history, same_model
from token_superposition import TokenSuperpositionError, bag_embedding, fold, span, superpose
from token_superposition import linear_multi_hot_cross_entropy as linear
from token_superposition.experiment.launch import Launch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

N, D, V, S = 512, 256, 128_256, 16


def example(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(N, D, device="cuda", dtype=dtype).requires_grad_()
    head = (torch.randn(V, D, device="cuda", dtype=dtype) * D**-0.5).requires_grad_()
    targets = torch.randint(V, (N, S), device="cuda")
    targets[1], targets[2, 3:], targets[3] = -100, -100, 7
    return hidden, head, targets


@pytest.mark.parametrize("impl", ["chunked", "native", "liger", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_implementation_is_the_float64_reference(impl: Any, dtype: torch.dtype) -> None:
    hidden, head, targets = example(dtype)
    exact = [t.detach().double().requires_grad_() for t in (hidden, head)]
    expected = linear(*exact, targets, impl="reference")
    got = linear(hidden, head, targets, impl=impl)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=0)
    pairs = zip(torch.autograd.grad(got, (hidden, head)), torch.autograd.grad(expected, exact), strict=True)
    for gradient, want in pairs:
        error = (gradient.double() - want).norm() / want.norm()
        assert error < (1e-4 if dtype == torch.float32 else 2e-2), error


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_step_never_waits_for_the_device(impl: Any, compiled: bool) -> None:
    hidden, head, targets = example()
    table = nn.Embedding(V, D, device="cuda", dtype=torch.bfloat16)
    ids = targets.clamp(min=0)

    def step(h: Tensor, w: Tensor) -> Tensor:
        return linear(h + bag_embedding(table, ids), w, targets, impl=impl)

    call = torch.compile(step, fullgraph=True) if compiled else step
    call(hidden, head).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(hidden, head).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_whole_logits_are_never_made(impl: Any) -> None:
    hidden, head, targets = (t.repeat(32, 1) if i != 1 else t for i, t in enumerate(example()))
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    whole = len(hidden) * V * hidden.itemsize
    linear(hidden, head, targets, impl=impl).backward()
    hidden.grad = head.grad = None
    peak = peak_bytes(lambda: linear(hidden, head, targets, impl=impl).backward())
    assert peak - hidden.nbytes - head.nbytes < (whole / 2 if impl == "triton" else whole)  # chunked: also in float32


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_deterministic_algorithms(impl: Any) -> None:
    hidden, head, targets = example()
    table = nn.Embedding(V, D, device="cuda", dtype=torch.bfloat16)

    def gradients() -> tuple[Tensor, ...]:
        rows = hidden + bag_embedding(table, targets.clamp(min=0))
        return torch.autograd.grad(linear(rows, head, targets, impl=impl), (hidden, head, table.weight))

    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_superposed_model_compiles() -> None:
    from tests.conftest import VOCAB, tiny

    model: Any = superpose(tiny("llama")).cuda()
    ids, targets = fold(torch.randint(VOCAB, (2, span(16, 4, 4)), device="cuda"), 4, 4)
    want = linear(model.get_decoder()(ids).last_hidden_state, model.lm_head.weight, targets)
    decoder = torch.compile(model.get_decoder())
    torch.testing.assert_close(linear(decoder(ids).last_hidden_state, model.lm_head.weight, targets), want)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fsdp2_with_one_process_is_the_unsharded_run(
    precision: str, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """The launch file as it is, resumed across the switch: the path that many GPUs take, without their traffic."""
    config = write_config(save_every=4, precision=precision, append="activation_checkpointing = true\n")
    # A fresh interpreter: CUDA does not survive a fork.
    plain = [sys.executable, "-m", "token_superposition", "train", config, "--out", tmp_path / "plain"]
    done = subprocess.run(list(map(str, plain)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    accelerate_launch("fsdp2.yaml", "token_superposition", "train", config, "--out", tmp_path / "sharded", processes=1)
    tolerance = 1e-4 if precision == "float32" else 2e-2
    same_history(tmp_path / "sharded", tmp_path / "plain", tolerance)
    same_model(tmp_path / "sharded", tmp_path / "plain", 100 * tolerance)
    assert (tmp_path / "sharded/checkpoints/checkpoint-4/pytorch_model_fsdp_0/__0_0.distcp").exists()
    forget_after(tmp_path / "sharded", tmp_path / "resumed", 4)
    accelerate_launch("fsdp2.yaml", "token_superposition", "train", config, "--out", tmp_path / "resumed", processes=1)
    same_history(tmp_path / "resumed", tmp_path / "sharded", tolerance)


def test_a_model_larger_than_the_gpu_is_refused() -> None:
    memory = torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(TokenSuperpositionError, match=r"launch with fsdp2.yaml on more than \d+ GPUs"):
        Launch.from_environment().check_memory(memory // 8)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = torch.cuda.device_count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(gpus + 1))
    with pytest.raises(TokenSuperpositionError, match=f"{gpus + 1} processes .* at most {gpus} here"):
        Launch.from_environment()
