"""What running out of memory looks like, and that the micro-batch then shrinks while the update stays the same.

The errors are torch's own but raised by the tests, which check how the training reacts.
"""

import os
from pathlib import Path

import pytest
import torch
from toy import lora_of, new_run, same, timeless, toy_training

from comfy_tdpo.memory.gauges import Ram
from comfy_tdpo.memory.running_out import largest_divisor, out_of_memory, smaller_micro_batch


class ShortOfMemory:
    """A policy's `step` that has room for `rows` rows where gradients are kept, from its `after`-th call on."""

    def __init__(self, policy, rows: int, after: int = 0):
        self.step, self.rows, self.after, self.calls = policy.step, rows, after, 0

    def __call__(self, latents, positions, prompt_embeds):
        self.calls += 1
        if torch.is_grad_enabled() and self.calls > self.after and len(latents) > self.rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.step(latents, positions, prompt_embeds)


def train(path, make_policy, micro_batch, rows=None, after=0):
    training = toy_training(new_run(path, micro_batch=micro_batch), make_policy)
    if rows is not None:
        training.policy.step = ShortOfMemory(training.policy, rows, after)
    list(training.epochs())
    return training


def test_the_micro_batch_is_found_before_the_first_sample(tmp_path, make_policy):
    short = train(tmp_path / "short", make_policy, micro_batch=4, rows=2)
    given = train(tmp_path / "given", make_policy, micro_batch=2)
    assert short.context.micro_batch == 2
    assert same(lora_of(short), lora_of(given))
    assert timeless(short.run.metrics()) == timeless(given.run.metrics())


def test_memory_that_runs_out_in_mid_epoch_changes_no_update(tmp_path, make_policy):
    short = train(tmp_path / "short", make_policy, micro_batch=4, rows=1, after=30)
    whole = train(tmp_path / "whole", make_policy, micro_batch=4)
    assert short.context.micro_batch == 1
    # Sums over rows in another order, through three epochs of Adam at lr 1e-3: float32's 6e-8 grows to about 1e-6.
    for a, b in zip(lora_of(short), lora_of(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_no_room_for_one_sample_says_what_to_lower(tmp_path, make_policy):
    with pytest.raises(ValueError, match="lower resolution"):
        train(tmp_path / "run", make_policy, micro_batch=4, rows=0)


class ShortOfMemoryToDecode:
    """A policy's `decode` that has room for `rows` latents."""

    def __init__(self, policy, rows: int):
        self.decode, self.rows = policy.decode, rows

    def __call__(self, latents, image_size=None, decoder=None):
        if len(latents) > self.rows:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return self.decode(latents, image_size, decoder)


def test_memory_that_runs_out_in_decoding_leaves_the_micro_batch_alone(tmp_path, make_policy):
    short = toy_training(new_run(tmp_path / "short", decode_batch=8), make_policy)
    short.policy.decode = ShortOfMemoryToDecode(short.policy, rows=3)
    list(short.epochs())
    given = toy_training(new_run(tmp_path / "given", decode_batch=2), make_policy)
    list(given.epochs())
    assert (short.context.decoder.batch, short.context.micro_batch) == (2, 2)
    assert same(lora_of(short), lora_of(given))
    assert timeless(short.run.metrics()) == timeless(given.run.metrics())


def test_no_room_to_decode_one_image_says_what_to_lower(tmp_path, make_policy):
    training = toy_training(new_run(tmp_path / "run"), make_policy)
    training.policy.decode = ShortOfMemoryToDecode(training.policy, rows=0)
    with pytest.raises(ValueError, match="lower resolution"):
        list(training.epochs())


@pytest.mark.parametrize(
    ("limit", "together", "rows"), [(12, 1, 12), (5, 1, 4), (1, 1, 1), (12, 2, 12), (5, 2, 4), (3, 2, 2), (1, 2, 2)]
)
def test_micro_batches_divide_the_update_into_whole_groups(limit, together, rows):
    assert largest_divisor(12, limit, together) == rows


@pytest.mark.parametrize(("together", "number"), [(1, "one sample"), (2, "2 samples")])
def test_the_smallest_group_is_not_divided(together, number):
    found = [12]
    with pytest.raises(ValueError, match=f"got out of memory with {number} at a time; expected room for {number}: "):
        while True:
            found.append(smaller_micro_batch(found[-1], 12, together))
    assert found == {1: [12, 6, 3, 1], 2: [12, 6, 2]}[together]


# --- what it looks like: as users have reported it

OUT_OF_MEMORY = {
    "CUDA": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ..."
    ),
    "CUDA before it had a class": RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.79 GiB ...)"),
    "CUDA's driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "HIP": RuntimeError("HIP out of memory. Tried to allocate 2.00 MiB. GPU 7 has a total capacity of 287.98 GiB ..."),
    "HIP's driver": RuntimeError("HIP error: out of memory\nHIP kernel errors might be asynchronously reported"),
    "XPU": RuntimeError("XPU out of memory. Tried to allocate 12.00 GiB (GPU 0; 11.33 GiB total capacity; ..."),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 5.56 GB, other allocations: 1.10 GB, max"),
    "MPS, one tensor": RuntimeError("Invalid buffer size: 58.07 GB"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "hipBLAS": RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    "cuDNN 8": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "all of cuDNN's kernels": RuntimeError("GET was unable to find an engine to execute this computation"),
    "all of its algorithms": RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    "MIOpen": RuntimeError("miopenStatusAllocFailed"),
    "RAM": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:73] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "116813856768 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "RAM on Windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory: you tried to allocate "
        "1073741824 bytes."
    ),
}
SOMETHING_ELSE = {
    "an illegal access": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "no kernel": RuntimeError("HIP error: no kernel image is available for execution on the device"),
    "a call that failed": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    "no text": RuntimeError(),
    "no text but a number": RuntimeError(12),
    "a user's words": ValueError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "a disk": OSError(28, "No space left on device"),
    "a stop": KeyboardInterrupt(),
}


@pytest.mark.parametrize("case", OUT_OF_MEMORY)
def test_running_out_of_memory_is_recognised_everywhere(case):
    assert out_of_memory(OUT_OF_MEMORY[case])


@pytest.mark.parametrize("case", SOMETHING_ELSE)
def test_other_errors_are_not_taken_for_it(case):
    assert not out_of_memory(SOMETHING_ELSE[case])


# --- the peak

BIG = 300 * 2**20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_the_peak_is_an_epochs_own(tmp_path, make_policy):
    def watch(phase, done, total):
        if (phase, done, training.context.epoch) == ("updating", 0, 0):
            torch.ones(BIG, dtype=torch.uint8)  # and freed at once

    training = toy_training(new_run(tmp_path / "run"), make_policy, watch=watch)
    first, second, _ = (metrics["memory/peak_bytes"] for metrics in training.epochs())
    # an epoch of the toy itself takes a few MB
    assert first - second > 0.8 * BIG


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="as Linux counts it")
def test_the_peak_is_what_was_held():
    ram = Ram()
    ram.reset()
    before = ram.peak()
    torch.ones(BIG, dtype=torch.uint8)
    assert ram.peak() - before == pytest.approx(BIG, rel=0.1)
