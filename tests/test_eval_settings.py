"""Training with one guidance, number of steps and resolution and drawing with others: each where it belongs, and
neither where the other is."""

import pytest
import torch
from toy import new_run, toy_training

from comfy_tdpo.rollout import Decoder, draw_images
from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.plots.image_grid import save_image_grid

PROMPTS = ["a red circle", "two blue squares"]


def rows_of(policy) -> list[int]:
    """How many rows the network gets in each of its calls, from now on."""
    rows = []
    policy.model.network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


@torch.no_grad()
def images_of(policy) -> torch.Tensor:
    return draw_images(Decoder(policy, 4), PROMPTS, [(42, "grid", 0), (42, "grid", 1)], 2)


def test_evaluating_is_a_policy_of_that_guidance(make_policy):
    policy = make_policy(trained=True, guidance=1.0, eval_guidance=3.0)
    before = images_of(policy)
    with policy.evaluating():
        inside = images_of(policy)
    assert torch.equal(inside, images_of(make_policy(trained=True, guidance=3.0)))
    assert torch.equal(images_of(policy), before) and not torch.equal(inside, before)
    assert torch.equal(before, images_of(make_policy(trained=True, guidance=1.0)))


@torch.no_grad()
def test_evaluating_is_a_policy_of_those_steps_and_pixels(make_policy):
    policy = make_policy(trained=True, eval_steps=2, eval_resolution="32x16")
    before = images_of(policy)
    with policy.evaluating():
        inside = images_of(policy)
    assert torch.equal(inside, images_of(make_policy(trained=True, steps=2, resolution="32x16")))
    assert inside.shape[2:] == (16, 32) and policy.size_of_evaluation == 2
    assert torch.equal(images_of(policy), before)
    with pytest.raises(ValueError, match="got eval_resolution 15; expected a positive multiple of 2 pixels"):
        make_policy(eval_resolution=15)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_guidance_is_back_however_the_block_ends(make_policy, error):
    policy = make_policy(trained=True, guidance=1.0, eval_guidance=3.0)
    before = images_of(policy)
    with pytest.raises(error), policy.evaluating():
        raise error
    assert policy.guidance == 1.0 and torch.equal(images_of(policy), before)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_without_a_value_of_its_own_it_is_that_of_the_training(make_policy, guidance):
    policy = make_policy(trained=True, guidance=guidance)
    before = images_of(policy)
    with policy.evaluating():
        assert torch.equal(images_of(policy), before)


def test_a_training_without_guidance_draws_its_grids_with_it(make_policy, tmp_path):
    run = new_run(tmp_path / "run", epochs=1, guidance=1.0, eval_guidance=3.0, eval_steps=2)
    training = toy_training(run, make_policy)
    rows, drawing = rows_of(training.policy), []
    keep_grid = training.keeper.keep_grid

    def watched(*args):
        before = len(rows)
        keep_grid(*args)
        drawing.extend(range(before, len(rows)))

    object.__setattr__(training.keeper, "keep_grid", watched)
    list(training.epochs())
    grids = [rows[call] for call in drawing]
    assert grids == [4] * 4, "two grids of two images in two steps, each both with and without its prompt"
    others = [count for call, count in enumerate(rows) if call not in set(drawing)]
    assert set(others) == {2}, "one row for each sample of a micro-batch"
    base = make_policy(steps=2, guidance=3.0, seed=run.config.seed)
    prompts = run.grid_prompts(run.config)
    seeds = [(run.config.seed, "grid", i) for i in range(2)]
    with torch.no_grad():
        save_image_grid(draw_images(Decoder(base, 4), prompts, seeds, 2), tmp_path / "expected.png")
    assert run.sample_grid(0).read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_a_failed_grid_leaves_the_training_its_guidance_and_its_weights(make_policy, tmp_path):
    settings = {"guidance": 1.0, "eval_guidance": 3.0, "policy": {"ema": 0.9}}
    training = toy_training(new_run(tmp_path / "run", epochs=1, **settings), make_policy)
    list(training.epochs())
    before = [parameter.detach().clone() for parameter in training.policy.parameters]

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.keeper.keep_grid(stop)
    assert training.policy.guidance == 1.0
    assert all(torch.equal(a, b) for a, b in zip(training.policy.parameters, before, strict=True))


def test_the_configuration_says_it():
    assert make_config(overrides={"eval_guidance": "none"}).eval_guidance is None
    assert make_config(overrides={"guidance": "1", "eval_guidance": "3"}).eval_guidance == 3.0
    assert make_config(overrides={"eval_resolution": "none", "eval_steps": "none"}).eval_resolution is None
    config = make_config(overrides={"eval_resolution": "64x32", "eval_steps": "50", "guidance": 2})
    assert config.drawn_with == {"steps": 50, "guidance": 2.0, "resolution": "64x32"}
    with pytest.raises(ValueError, match="eval_steps: got 0"):
        make_config(overrides={"eval_steps": 0})
    with pytest.raises(ValueError, match="eval_guidance: got 0.5"):
        make_config(overrides={"eval_guidance": 0.5})


def test_a_grid_takes_as_many_rows_as_fit_and_the_training_keeps_its_own(make_policy, tmp_path):
    """One at a time where two run out of memory, or where the images have twice the training's pixels."""

    def rows_at_once(name: str, room: int, **settings) -> list[int]:
        run = new_run(tmp_path / name, eval_steps=2)
        training = toy_training(run, lambda **known: make_policy(**known, **settings))
        step, rows, before = training.policy.step, [], training.context.micro_batch

        def short(latents, *rest):
            rows.append(len(latents))
            if len(latents) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step(latents, *rest)

        training.policy.step = short
        training.keeper.keep_grid()
        assert run.sample_grid(0).is_file() and training.context.micro_batch == before
        return rows

    assert rows_at_once("short", room=1) == [2, 1, 1, 1, 1]
    assert rows_at_once("large", room=2, eval_resolution="32x16") == [1, 1, 1, 1]
