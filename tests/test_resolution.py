"""Images that are not square: from the noise to the sample grid, from which a picture is cut out again."""

import pytest
import torch
from toy import new_run, toy_training

from comfy_tdpo.nodes.runs.voting import picture_in_grid
from comfy_tdpo.resolution import sides

WIDE = "32x16"


def test_latents_and_images_have_its_sides(make_policy):
    policy = make_policy(resolution=WIDE)
    assert policy.latent_shape == (4, 8, 16) and policy.latent_size == 4 * 8 * 16
    latents = torch.randn(1, *policy.latent_shape)
    assert policy.decode(latents).shape == (1, 3, 16, 32)


@pytest.mark.parametrize(("image_size", "height"), [(16, 8), (32, 16), (99, 16)])
def test_a_smaller_image_keeps_the_shape(make_policy, image_size, height):
    policy = make_policy(resolution=WIDE)
    found = policy.decode(torch.randn(1, *policy.latent_shape), image_size)
    assert found.shape == (1, 3, height, min(image_size, 32))


def test_a_run_trains_on_it_and_its_grid_gives_the_pictures_back(make_policy, tmp_path):
    run = new_run(tmp_path / "run", resolution=WIDE, epochs=1, critic={"image_size": 16})
    training = toy_training(run, lambda **settings: make_policy(resolution=WIDE, **settings))
    (metrics,) = training.epochs()
    assert metrics["policy/ratio_drift"] == 0 and all(value == value for value in metrics.values())
    picture, _ = picture_in_grid(run, 0, 0, 1)
    assert (picture.shape[2], picture.shape[1]) == sides(WIDE)
    run.write_config(run.config.model_copy(update={"resolution": "16x32"}))
    with pytest.raises(ValueError, match="does not have the 2 images of 16x32 pixels"):
        picture_in_grid(run, 0, 0, 1)


@pytest.mark.parametrize("resolution", ["33x16", "32x15", "0x16"])
def test_each_side_is_a_multiple_of_a_latents_pixels(make_policy, resolution):
    with pytest.raises(ValueError, match=f"got resolution {resolution}; expected a positive multiple of 2 pixels"):
        make_policy(resolution=resolution)
