"""Half precision: losses are scaled so that small gradients are not lost; updates with infinite ones are skipped."""

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy import lora_of, new_run, same, toy_training

from comfy_tdpo.models.stable_diffusion import StableDiffusion
from comfy_tdpo.trainer.run import RunFolder

ALGORITHMS = ["tdpo-r", "sdpo", "draft"]


def scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_scale_that_overflows_is_halved_and_changes_nothing(tmp_path, make_policy, algorithm):
    """Until it fits; the metrics tell which share of the updates was skipped."""
    steps = {"steps": 4, "prompts": "shapes-complex"} if algorithm == "sdpo" else {}
    run = new_run(tmp_path / "run", algorithm=algorithm, precision="fp16", epochs=1, policy={"ema": 0.5}, **steps)
    training = toy_training(run, make_policy)
    training.context.scaler = scaler(2.0**100)
    before, average = lora_of(training), [weight.clone() for weight in training.policy.average.state().values()]
    (metrics,) = training.epochs()
    updates = len(training.method.groups(1))
    assert metrics["policy/skipped_fraction"] == 1
    assert training.context.scaler.get_scale() == 2.0 ** (100 - updates)
    assert same(lora_of(training), before) and same(list(training.policy.average.state().values()), average)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_scale_is_taken_off_before_gradients_are_clipped(tmp_path, make_policy, algorithm):
    """In float32, where a power of two changes no digit."""
    steps = {"steps": 4, "prompts": "shapes-complex"} if algorithm == "sdpo" else {}
    loras = []
    for scale in (None, 1024.0):
        run = new_run(tmp_path / str(scale), algorithm=algorithm, epochs=1, **steps)
        training = toy_training(run, make_policy)
        if scale:
            training.context.scaler = scaler(scale)
        before = lora_of(training)
        list(training.epochs())
        assert not same(lora_of(training), before)
        loras.append(lora_of(training))
    assert same(*loras)


def test_the_scale_is_part_of_a_run(tmp_path, make_policy):
    run, stop = new_run(tmp_path / "run", precision="fp16"), threading.Event()

    def watch(phase, done, total):
        if (phase, done) == ("updating", 2):
            stop.set()

    first = toy_training(run, make_policy, stop, watch)
    first.context.scaler = scaler(2.0**100)
    list(first.epochs())
    assert first.stopped
    second = toy_training(RunFolder.open(run.path), make_policy)
    second.state.restore(run.checkpoints)
    assert second.context.scaler.get_scale() == 2.0**98


def test_the_ratio_of_fresh_samples_is_1_and_the_lora_is_float32(tmp_path, make_policy):
    run = new_run(tmp_path / "run", precision="fp16")
    training = toy_training(run, make_policy)
    metrics = list(training.epochs())
    assert [line["policy/ratio_drift"] for line in metrics] == [0, 0, 0]
    assert {weight.dtype for weight in lora_of(training)} == {torch.float32}
    assert training.policy.model.network.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("upcast", "second", "dtype"), [(True, True, "float32"), (False, True, "float16"), (True, False, "float16")]
)
def test_only_the_autoencoder_of_xl_is_kept_in_float32(make_components, upcast, second, dtype):
    """Unless it is said not to overflow."""
    parts = make_components(0, torch.float16)
    parts.vae.register_to_config(force_upcast=upcast)
    if second:
        parts = replace(parts, text_encoder_2=parts.text_encoder, tokenizer_2=parts.tokenizer)
    model = StableDiffusion.from_components(parts)
    assert isinstance(model.networks["vae"], nn.Module)
    assert model.networks["vae"].dtype == getattr(torch, dtype)
