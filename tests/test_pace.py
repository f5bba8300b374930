"""How long a run will take, from its first sample on."""

import pytest

from comfy_tdpo.trainer.pace import UPDATING, Pace


def test_the_first_micro_batch_gives_an_estimate_and_the_updates_correct_it():
    pace = Pace()
    assert pace.epoch() is None
    pace.see("drawing samples", 0, 16, now=0.0)
    pace.see("sampling", 0, 96, now=10.0)
    assert pace.epoch() is None
    pace.see("sampling", 24, 96, now=13.0)
    assert pace.epoch() == pytest.approx(12 * (1 + UPDATING))
    pace.see("sampling", 72, 96, now=18.0)
    assert pace.epoch() == pytest.approx(8 / 72 * 96 * (1 + UPDATING))
    pace.see("updating", 0, 20, now=22.0)
    pace.see("updating", 5, 20, now=24.0)
    assert pace.epoch() == pytest.approx(8 / 72 * 96 + 8)


def test_part_of_a_micro_batch_gives_an_estimate_once_a_whole_sample_is_done():
    """The first model calls are slow, as all warms up."""
    pace = Pace()
    pace.see("sampling", 0, 96, now=10.0)
    pace.see("sampling", 0.75, 96, now=13.0)
    assert pace.epoch() is None
    pace.see("sampling", 1.5, 96, now=14.0)
    assert pace.epoch() == pytest.approx(4 / 1.5 * 96 * (1 + UPDATING))


def test_a_resumed_epoch_is_measured_from_where_it_goes_on():
    pace = Pace()
    pace.see("sampling", 48, 96, now=100.0)
    pace.see("sampling", 72, 96, now=106.0)
    assert pace.epoch() == pytest.approx(24 * (1 + UPDATING))


def test_what_is_left_of_a_phase_is_told_by_what_is_done_of_it():
    pace = Pace()
    pace.see("recommending", 0, 100, now=0.0)
    assert pace.left(0, 100) is None
    pace.see("recommending", 25, 100, now=10.0)
    assert pace.left(25, 100) == pytest.approx(30)
    pace.see("checking the choice", 0, 40, now=40.0)
    assert pace.left(0, 40) is None, "another phase draws at another pace"
