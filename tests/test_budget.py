"""MemoryBudget on a device that counts: real tensors, whose bytes are limited as a GPU's are."""

from contextlib import contextmanager

import pytest
import torch
from toy import Brightness, new_run, toy_training

from comfy_tdpo.memory.budget import MemoryBudget, Need, need_of, peak_of
from comfy_tdpo.memory.counting import Held, kept_bytes
from comfy_tdpo.rehearsal import Rehearsal

SETTINGS = {
    "algorithm": "ddpo-2",
    "epochs": 1,
    "samples_per_epoch": 8,
    "samples_per_update": 8,
    "micro_batch": 8,
    "decode_batch": 8,
    "policy": {"train_until": 0.3},
    "output": {"grid_images": 1},
}
MORE = 2**20  # what an epoch of the toy holds besides: trajectories, prompts, targets, moments, about half a row


class Card(Held):
    """A device with `total` bytes: what goes beyond raises what CUDA raises."""

    def __init__(self, total: int):
        super().__init__(total)
        self.errors = 0

    def _hold(self, storage):
        super()._hold(storage)
        if self.bytes > self.total:
            self.errors += 1
            raise torch.OutOfMemoryError("CUDA out of memory")


def settled(path, make_policy, free, **settings):
    """A toy training that has settled on a card with that many bytes free, the card, and what the run tells."""
    run, told = new_run(path, **SETTINGS | settings), []
    card = Card(2**40)
    with card:
        training = toy_training(run, make_policy)
        training.gauge, training._warn, card.total = card, told.append, card.bytes + free
        training._settle()
    return training, card, told[0]


def measured(make_policy, **settings):
    """What the phases of the toy take, one row and each further one."""
    budget = MemoryBudget(Held(), 16, 16, 16)
    rehearsal = Rehearsal(make_policy(steps=3, **settings), "a cat", [Brightness()])
    with budget.gauge:
        return {phase: budget.need(getattr(rehearsal, phase)) for phase in ("sample", "train", "decode")}


def test_the_peak_grows_along_the_measured_line(make_policy):
    rehearsal = Rehearsal(make_policy(steps=3), "a cat", [])
    with Held() as held:
        for work in (rehearsal.sample, rehearsal.train, rehearsal.decode):
            work(1)  # encodes the prompt
            first, more = need_of(held, work)
            # a decoder's first row is no larger than the others, but its conversion to another layout may be
            assert peak_of(held, work, 8) == pytest.approx(first + 7 * more, rel=0.02)


def test_what_autograd_would_keep_is_counted_without_keeping_it(make_policy):
    policy = make_policy(steps=3)
    rehearsal = Rehearsal(policy, "a cat", [])
    with Held() as held, torch.enable_grad():
        rehearsal._step(1)  # encodes the prompt
        before = held.bytes
        mean = rehearsal._step(1)
        kept = held.bytes - before - mean.untyped_storage().nbytes()
        del mean
        held.reset()
        assert rehearsal.kept() == kept > 10**6
        assert held.peak() - before < kept / 3


def test_weights_that_a_backward_pass_needs_are_there_anyway():
    weight, x = torch.ones(8, 8), torch.ones(2, 8, requires_grad=True)
    assert kept_bytes(lambda: x @ weight.t() * 1, [weight]) == 0
    assert kept_bytes(lambda: x @ weight.t() * 1, []) == weight.nbytes
    assert kept_bytes(lambda: x.exp() * x.exp(), []) == 2 * x.nbytes, "each result once, though twice needed"


@pytest.mark.parametrize("rows", [2, 8])
def test_an_epoch_fits_where_the_budget_says_so_and_twice_as_many_rows_would_not(tmp_path, make_policy, rows):
    train = measured(make_policy)["train"]
    training, card, told = settled(
        tmp_path / "run", make_policy, int((train.first + (rows - 1) * train.more) / 0.9) + MORE
    )
    assert training.context.micro_batch == rows
    assert f"; {rows} of 8 samples at once" in told and "checkpointing" not in told
    with card:
        training._run_epoch()
        assert card.errors == 0
        assert training.context.micro_batch == rows
        with pytest.raises(torch.OutOfMemoryError):
            Rehearsal(training.policy, "a cat", []).train(2 * rows)


def test_where_one_row_does_not_fit_blocks_are_computed_again_and_nothing_crashes_before(tmp_path, make_policy):
    plain, recomputed = (measured(make_policy, gradient_checkpointing=on)["train"].first for on in (False, True))
    training, card, told = settled(tmp_path / "run", make_policy, recomputed + MORE)
    assert card.total < card.bytes + plain
    assert card.errors == 0, "it was counted, not tried"
    assert training.policy.checkpointing and training.context.micro_batch == 1
    assert "with gradient checkpointing, without which one sample takes" in told
    with card:
        training._run_epoch()
    assert card.errors == 0


def test_where_no_pair_fits_blocks_are_computed_again(make_policy):
    """For a method whose rows belong together, although one row would fit; and where that does not help, it is said."""
    plain, recomputed = (measured(make_policy, gradient_checkpointing=on)["train"] for on in (False, True))
    assert recomputed.first + recomputed.more < plain.first

    def settled_in(room: int, together: int) -> tuple[int, bool]:
        card = Card(2**40)
        with card:
            rehearsal = Rehearsal(make_policy(steps=3), "a cat", [])
            rehearsal.sample(1)  # encodes the prompt
            card.total = card.bytes + int(room / 0.9) + 2**16
            choice, _ = MemoryBudget(card, 4, 4, 4, together=together).settle(rehearsal)
        assert card.errors == 0
        return choice.micro_batch, choice.checkpointing

    assert [settled_in(plain.first + plain.more // 2, together) for together in (1, 2)] == [(1, False), (2, True)]
    with pytest.raises(ValueError, match="got out of memory with 2 samples at a time"):
        settled_in(recomputed.first, 2)


def test_updates_may_take_what_the_rewards_leave(make_policy):
    train = measured(make_policy)["train"]
    two_rows, two_more = (int(size / 0.9) + 2**16 for size in (train.first + train.more, 2 * train.more))

    class Leaving(Rehearsal):
        """Beside rewards as large as two rows, if any, which are somewhere else during updates."""

        def __init__(self, rewards):
            super().__init__(make_policy(steps=3), "a cat", [])
            self.held = [torch.empty(two_more, dtype=torch.uint8)] * rewards

        @contextmanager
        def updating(self):
            rewards, self.held = len(self.held), []
            yield
            self.held = [torch.empty(two_more, dtype=torch.uint8)] * rewards

    for rewards, fit in ((0, 2), (1, 4)):
        card = Card(2**40)
        with card:
            rehearsal = Leaving(rewards)
            rehearsal.sample(1)  # encodes the prompt
            card.total = card.bytes + two_rows
            choice, told = MemoryBudget(card, 4, 4, 4).settle(rehearsal)
        assert (choice.micro_batch, choice.checkpointing, card.errors) == (fit, False, 0)
        assert ("; the rewards, " in told and "are in main memory during updates" in told) == bool(rewards)


def test_no_room_for_one_row_says_what_to_lower(tmp_path, make_policy):
    with pytest.raises(ValueError, match="got out of memory with one sample at a time.*lower resolution"):
        settled(tmp_path / "run", make_policy, free=200_000)


def test_images_are_decoded_as_many_at_once_as_fit(tmp_path, make_policy):
    decode = measured(make_policy)["decode"]
    budget = MemoryBudget(Held(), 16, 16, 16)
    room = 5 * decode.more + decode.first
    assert budget.choose(room, [Need(1, 1)], decode, False) == (16, 6, False)
    assert budget.choose(room, [Need(room // 11, room // 11)], decode, False) == (8, 6, False), "a divisor of 16"
    assert budget.choose(0, [Need(1, 1)], decode, False) == (1, 1, False), "the last resort is to try"


def test_a_resumed_run_goes_on_with_what_was_chosen(tmp_path, make_policy):
    recomputed = measured(make_policy, gradient_checkpointing=True)["train"].first
    training, _, _ = settled(
        tmp_path / "run", make_policy, recomputed + MORE, epochs=2, samples_per_epoch=4, samples_per_update=4
    )
    assert training.policy.checkpointing
    training.context.decoder.batch = 3
    training._settle = lambda: None
    epochs = training.epochs()
    next(epochs)
    epochs.close()
    resumed = toy_training(training.run, make_policy)
    assert not resumed.policy.checkpointing
    list(resumed.epochs())
    assert resumed.policy.checkpointing and resumed.policy.model.network.is_gradient_checkpointing
    assert (resumed.context.micro_batch, resumed.context.decoder.batch) == (training.context.micro_batch, 3)
