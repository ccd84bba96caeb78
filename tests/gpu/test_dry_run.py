"""Dry runs against the card: each way in which docs/dry-run.md says that CUDA's kernels are not the CPU's."""

from __future__ import annotations

from dataclasses import replace

import kernel_cases
import pytest
import torch

from trl_memtrace.device import cublas_workspace_bytes, custom_device
from trl_memtrace.dryrun import dry_run

CASES = [pytest.param(make, id=name) for cases in kernel_cases.CASES.values() for name, make in cases.items()]


def this_card():
    total = torch.cuda.get_device_properties(0).total_memory
    return replace(custom_device(total), capability=torch.cuda.get_device_capability())


@pytest.mark.parametrize("make", CASES)
def test_a_case_takes_what_was_predicted(make):
    predicted, measured = kernel_cases.predicted(make, this_card()), kernel_cases.measured(make)
    print(f"predicted {predicted}, measured {measured}")
    assert predicted == measured


def test_cublas_takes_the_workspace_that_is_counted():
    assert torch.backends.cuda.cublas_workspace_size() == cublas_workspace_bytes(torch.cuda.get_device_capability())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_the_dtypes_that_were_predicted(dtype):
    def dtypes():
        x = torch.ones(8, 8, dtype=dtype, device="cuda")
        with torch.autocast("cuda", dtype):
            results = x.pow(3), x.exp(), x.softmax(-1), x.sum(), x.cumsum(0), x @ x, x + x, torch.cat((x, x.float()))
            norms = torch.nn.functional.layer_norm(x, (8,)), torch.nn.functional.rms_norm(x, (8,))
        return [result.dtype for result in (*results, *norms)]

    with dry_run():
        predicted = dtypes()
    assert predicted == dtypes()


def test_a_training_step_takes_what_was_predicted():
    """A small Phi-3 with AdamW: what is allocated at the peak, within 1%."""
    import tiny

    def train():
        model = tiny.model("phi3", hidden_size=512, intermediate_size=1024, vocab_size=8192).cuda()
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.randint(2, 8192, (8, 512), device="cuda")
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with dry_run(device=this_card()) as dry:
        train()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train()
    predicted = dry.memory.allocator.allocated_peak_bytes
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.01)
