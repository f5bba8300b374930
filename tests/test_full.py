"""Full fine-tuning: every weight of the denoiser is trained, against what the same run without it would leave alone."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_files import benchmark
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy import new_run, same, toy_config, toy_training

from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.memory.budget import bytes_of_trajectories
from comfy_tdpo.models.stable_diffusion import StableDiffusion
from comfy_tdpo.nodes.runs.outputs import lora_weights
from comfy_tdpo.nodes.runs.registry import Runs, advice, plan_of
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.rollout import denoise, draw_noise
from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.run import disk
from comfy_tdpo.trainer.run.identity import identity


@pytest.fixture
def make_full(make_policy):
    """A policy all of whose weights are trained; `moved` moves each of them."""

    def make(moved: bool = False, **settings):
        policy = make_policy(train="full", **settings)
        if moved:
            generator = torch.Generator().manual_seed(5)
            for parameter in policy.parameters:
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
        return policy

    return make


@torch.no_grad()
def output(network) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 32, generator=generator)
    return network(latents, torch.tensor([981, 21]), states, return_dict=False)[0]


def save(policy, path):
    policy.trainable.export(path, {"base_model": "tiny", "epoch": "7"})
    return load_file(path)


# --- what is trained


def test_the_denoiser_is_trained_and_nothing_else(make_full):
    policy = make_full()
    trained = {id(parameter) for parameter in policy.parameters}
    assert trained == {id(parameter) for parameter in policy.model.network.parameters()}
    assert all(parameter.requires_grad for parameter in policy.parameters)
    others = [weight for name, part in policy.model.networks.items() if name != "unet" for weight in part.parameters()]
    assert others and not any(weight.requires_grad for weight in others)


def test_before_training_it_is_the_base_model_to_the_bit(make_full, make_components):
    assert torch.equal(output(make_full().model.network), output(make_components().unet))


def test_in_bf16_the_weights_are_trained_in_float32_and_saved_in_bf16(make_full, tmp_path):
    policy = make_full(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in policy.parameters} == {torch.float32}
    assert {weight.dtype for weight in save(policy, tmp_path / "model.safetensors").values()} == {torch.bfloat16}


# --- files


def test_diffusers_loads_the_file_as_the_trained_model(make_full, make_components, tmp_path):
    policy, unet = make_full(moved=True), make_components().unet
    before = output(unet)
    unet.load_state_dict(save(policy, tmp_path / "model.safetensors"))
    assert isinstance(unet, UNet2DConditionModel)
    assert torch.equal(output(unet), output(policy.model.network)) and not torch.equal(output(unet), before)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "base_model": "tiny", "epoch": "7"}


def test_a_file_at_strength_1_and_0_is_the_snapshot_and_the_base_to_the_bit(make_full, tmp_path):
    moved, other = make_full(moved=True), make_full()
    weights, expected, base = save(moved, tmp_path / "m"), output(moved.model.network), output(other.model.network)
    for strength, wanted in ((1.0, expected), (0.0, base), (1.0, expected)):
        other.trainable.load_exported(weights, strength)
        assert torch.equal(output(other.model.network), wanted)


def test_between_them_every_weight_is_on_the_line_from_the_base_to_the_snapshot(make_full, tmp_path):
    moved, other = make_full(moved=True), make_full()
    weights, base = save(moved, tmp_path / "m"), {name: w.clone() for name, w in other.trainable.state().items()}
    for strength in (0.25, 1.5):
        other.trainable.load_exported(weights, strength)
        for name, weight in save(other, tmp_path / "half").items():
            expected = torch.lerp(base[name].double(), weights[name].double(), strength)
            torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)  # float32 near 1


def test_weights_of_another_model_are_refused_and_change_nothing(make_full, tmp_path):
    policy = make_full(moved=True)
    before, weights = output(policy.model.network), save(policy, tmp_path / "m")
    wrong = {"missing": dict(list(weights.items())[1:]), "shape": weights | {"conv_in.weight": torch.zeros(8, 4, 3, 3)}}
    for kind, given in wrong.items():
        for load in (policy.trainable.load, policy.trainable.load_exported):
            with pytest.raises(ValueError, match=f"of another model: its .* is .*{kind}.*policy.train full"):
                load(given)
    assert torch.equal(output(policy.model.network), before)


# --- the reference


def test_the_reference_is_the_base_and_afterwards_the_policy_is_back_to_the_bit(make_full, make_components):
    policy, base = make_full(moved=True), output(make_components().unet)
    trained = output(policy.model.network)
    with torch.no_grad(), policy.reference():
        assert torch.equal(output(policy.model.network), base)
    assert torch.equal(output(policy.model.network), trained)
    policy.kl_reference.reset()
    for parameter in policy.parameters:
        parameter.data.add_(0.01)
    later = output(policy.model.network)
    with torch.no_grad(), policy.reference():
        assert torch.equal(output(policy.model.network), trained)
    assert torch.equal(output(policy.model.network), later) and not torch.equal(later, trained)


# --- runs


def test_another_base_model_is_another_run_even_when_all_of_it_is_trained(make_full, make_components):
    config, parts = make_config(overrides={"policy": {"train": "full"}}), make_components()
    parts.unet.conv_in.weight.data[0] += 0.5
    model = StableDiffusion.from_components(parts)
    other = DiffusionPolicy(model, steps=4, guidance=3.0, resolution=16, settings=config.policy)
    policies = (make_full(), make_full(moved=True), other)
    one, moved, another = (identity(config, policy, ["x"], {}) for policy in policies)
    assert one == moved and one != another


def test_a_run_keeps_whole_models_in_place_of_loras(tmp_path, make_policy):
    run = new_run(tmp_path / "run", policy={"train": "full"}, epochs=2)
    training = toy_training(run, make_policy)
    list(training.epochs())
    kept = sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*.safetensors"))
    models = [name for name in kept if "checkpoints" not in name]
    assert models == ["model/epoch-0002.safetensors", "model/latest.safetensors"] and not (run.path / "lora").exists()
    latest, trained = load_file(run.latest_lora), training.policy.trainable.state()
    assert same(list(trained.values()), [latest[name] for name in trained])


@pytest.mark.parametrize("form", ["exact", "sampled"])
def test_the_kl_measured_after_sampling_is_that_of_every_step(form, tmp_path, make_policy):
    """With the reference swapped in once an epoch, in place of once or more in every step and update."""
    kl = {"coefficient": 0.1, "form": form}
    run = new_run(tmp_path / "run", algorithm="ddpo-100", policy={"train": "full", "replay": 1}, kl=kl, epochs=2)
    training, entered = toy_training(run, make_policy), []
    policy, reference = training.policy, training.policy.kl_reference.swapped_in
    policy.kl_reference.swapped_in = lambda: (entered.append(training.context.epoch), reference())[1]
    for parameter in policy.parameters:
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    compared = []
    metrics = training.method.metrics

    def compare(batch):
        if not compared:  # at the first epoch, whose noise is that of its coordinates
            noise = draw_noise(policy, [training.context.noise_of(row) for row in range(len(batch))])
            compared.append((batch.kl.clone(), noise, batch.prompts))
        return metrics(batch)

    before = {name: weight.clone() for name, weight in policy.trainable.state().items()}
    training.method.metrics = compare
    list(training.epochs())
    assert entered == [0, 1]
    measured, noise, prompts = compared[0]
    policy.trainable.load(before)
    with torch.no_grad():
        expected = denoise(policy, prompts, noise, form).kl
    assert (expected.abs() > 1e-2).all()
    # means recovered from samples are off by 1e-7 of a latent's size, and steps differ from them by 1e-2 and more
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-3)


def test_what_the_kl_keeps_beside_the_latents_counts_as_trajectories(tmp_path, make_policy):
    settings = {"algorithm": "ddpo-100", "policy": {"train": "full", "replay": 1}, "epochs": 1}
    run = new_run(tmp_path / "run", **settings, kl={"coefficient": 0.1})
    training = toy_training(run, make_policy)
    list(training.epochs())
    config, policy, kept = training.config, training.policy, training.method.replay.samples
    latents, means = kept["latents"].nbytes, kept["reference_means"].nbytes
    assert means > 0 and bytes_of_trajectories(config, policy, samples=0) == latents + means
    joined = bytes_of_trajectories(config, policy, samples=config.samples_per_epoch) - latents - means
    assert joined == latents + 2 * means, "the means are joined once the latents are"
    without_kl = toy_config(**settings)
    assert bytes_of_trajectories(without_kl, policy, samples=0) == latents
    assert bytes_of_trajectories(without_kl, policy, samples=config.samples_per_epoch) == 3 * latents


# --- the disk


def test_a_run_says_what_it_needs_of_the_disk_and_needs_no_more(tmp_path, make_policy, caplog):
    """Against the largest size that its folder ever has."""
    settings = {"policy": {"train": "full", "ema": 0.5}, "kl": {"coefficient": 0.1, "reset_every": 1}}
    run, sizes = new_run(tmp_path / "run", epochs=3, **settings), []
    training = toy_training(run, make_policy)
    said = float(re.search(r"the run needs ([\d.]+) MB of disk", caplog.text)[1]) * 1e6

    def weigh(*_) -> None:
        files = [*run.checkpoints.rglob("*.safetensors"), *run.snapshots.rglob("*.safetensors")]
        sizes.append(sum(path.stat().st_size for path in files))

    for _ in training.epochs():
        weigh()
    assert max(sizes) < 1.1 * said, "what is small is not counted"
    assert said < 2.5 * max(sizes), "one more checkpoint and models that may come are"
    assert disk.bytes_of_snapshot(training.policy) == pytest.approx(run.latest_lora.stat().st_size, rel=0.05)


def test_a_run_that_the_disk_has_no_room_for_is_refused(tmp_path, make_policy, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    run = new_run(tmp_path / "run", policy={"train": "full"})
    with pytest.raises(ValueError, match=r"3.0 MB free .* room for .* MB more.*raise output.samples_every"):
        toy_training(run, make_policy)
    toy_training(new_run(tmp_path / "lora"), make_policy)


# --- in ComfyUI's folders


def test_whole_models_are_shared_where_load_diffusion_model_looks(tmp_path):
    """And those of Shapes, which it does not know, are not; the lora output of their node is empty."""
    runs = Runs(tmp_path / "runs", tmp_path / "loras", tmp_path / "models")
    settings = {"policy": {"train": "full"}, "prompts": "simple-animals", "rewards": {"colourfulness": 1.0}}
    run = new_run(runs.root / "mine", model="comfyui:SDXL:1", **settings)
    assert runs.lora_name(run) is None
    for value in (1.0, 2.0):  # the second replaces a file that the shared one is linked to
        for path in (run.latest_lora, run.recommended_lora):
            write_atomically(path, lambda file, value=value: save_file({"x": torch.tensor(value)}, file))
        runs.share_loras(run)
        for name in ("mine", "recommended/mine"):
            assert load_file(tmp_path / "models" / "tdpo" / f"{name}.safetensors")["x"] == value
    assert runs.lora_name(run) == str(Path("tdpo/mine.safetensors")) and lora_weights(run) == {}
    of_shapes = new_run(runs.root / "shapes", policy={"train": "full"})
    save_file({"x": torch.zeros(1)}, of_shapes.latest_lora)
    runs.share_loras(of_shapes)
    assert runs.lora_name(of_shapes) is None and not (tmp_path / "loras").exists()
    assert sorted(path.name for path in (tmp_path / "models" / "tdpo").iterdir()) == ["mine.safetensors", "recommended"]


def test_a_node_says_what_became_of_a_whole_model():
    status = {"state": "finished", "epoch": 2, "epochs": 2}
    longer = "To train longer, set epochs to more than 2, such as 4, and queue the graph."
    listed = "Load Diffusion Model lists its model; TDPO LoRA Apply applies it."
    assert advice(status | {"lora": "tdpo/x"}, False, True) == f"{listed} {longer}"
    assert advice(status | {"lora": None}, False, True) == f"TDPO LoRA Apply applies its model. {longer}"
    assert "for all weights with learning rate 2e-05" in plan_of(toy_config(policy={"train": "full", "lr": 2e-5}))


# --- the benchmark's page


def test_the_benchmark_compares_seed_by_seed_at_the_end(tmp_path):
    full = benchmark("full")

    def of(gain: float, gold: float) -> dict:
        series = {"queries": [96, 192], "reward": [5.0, 5.0 + 4 * gain], "std": [1.0, 1.0], "dormant": [10.0, 12.0]}
        series |= {full.GOLD: [0.7, 0.7 - 2 * gold], full.JUDGE: [0.8, 0.8]}
        return series | {"seconds": [3.0, 4.0], "bytes": [2**30, 2**31]}

    # curves are means of the latest epochs, so that half of the last change shows
    runs = {"ddpo-g, LoRA": {1: of(0.5, 0.1), 2: of(0.7, 0.1)}}
    runs["ddpo-g, all weights"] = {1: of(0.6, 0.2), 2: of(0.8, 0.2)}
    text = full.page(runs, [{"date": "2026-01-01", "machine": "one"}])
    (row,) = [line for line in text.splitlines() if line.startswith("| ddpo-g | 2")]
    assert row == "| ddpo-g | 2 | +0.200 ± 0.000 | +0.100 ± 0.000 | +0.000 ± 0.000 |"
    assert "| ddpo-g, all weights | 10.0 | 12.0 | 148 (2) | 7 | 2.00 |" in text
    full.draw(runs, tmp_path / "full.png")
    assert (tmp_path / "full.png").stat().st_size > 10_000


def test_the_benchmark_tells_the_neurons_of_each_layer(tmp_path, make_policy, monkeypatch):
    """In percent of the layer's, in the order of the U-Net; a panel for what was reset only where something was."""
    full = benchmark("full")
    neurons = {"policy_reset": "active", "every": 2}
    run = new_run(tmp_path / "run", policy={"train": "full"}, neurons=neurons)
    list(toy_training(run, make_policy).epochs())
    told = full.series_of(run)
    layers = list(told["dormant by layer"][0])
    assert len(told["dormant by layer"]) == run.config.epochs and len(layers) > 1
    assert [set(epoch) for epoch in told["reset by layer"]] == [set(), set(layers), set()]
    shares = [told[f"{share} by layer"][1] for share in full.LAYERS]
    assert all(shares[0][name] + shares[1][name] == pytest.approx(100, abs=0.02) for name in layers), (
        "the rest was reset"
    )
    assert [full._depth(name)[0] for name in sorted(layers, key=full._depth)] == sorted(
        ("down", "mid", "up").index(name.partition("_")[0]) for name in layers
    )
    runs = {full.WHOLE: {1: told | {"reset by layer": [{}] * 3}}, f"{full.WHOLE}, active reset": {1: told}}
    figures: list = []
    monkeypatch.setattr(full.pyplot, "close", figures.append)
    full.draw_neurons(runs, tmp_path / "neurons.png")
    assert (tmp_path / "neurons.png").stat().st_size > 10_000
    assert [axes.get_visible() for axes in figures[0].axes] == [True, True, False, True], "nothing was reset there"
