"""When memory runs out the micro-batch shrinks and the update stays the same. The error is torch's own but raised
by the test, which checks how the training reacts.
"""

import pytest
import torch
from toy import lora_of, new_run, same, timeless, toy_training


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

    def __call__(self, latents, image_size=None):
        if len(latents) > self.rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.decode(latents, image_size)


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
