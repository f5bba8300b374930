"""AlignProp, DRaFT and ReFL: their gradients by central differences, by plain autograd and in closed form."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from scipy.stats import norm
from tint import TintModel
from torch import Tensor, nn
from toy import Brightness, new_run

from comfy_tdpo.blocks import blocks_of
from comfy_tdpo.methods.direct.alignprop import first_step
from comfy_tdpo.methods.direct.recompute import recomputing
from comfy_tdpo.methods.direct.refl import drawn_step
from comfy_tdpo.methods.direct.settings import TruncationSettings
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.randomness import generator_at
from comfy_tdpo.rewards import RewardError, WeightedSum, function, load_rewards
from comfy_tdpo.rewards.networks import networks_of
from comfy_tdpo.rollout import denoise, draw_noise
from comfy_tdpo.swapping import copied, swapped
from comfy_tdpo.trainer import assemble as assembling
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.training import Training

STEPS, SAMPLES = 4, 4
UNCLIPPED = {"max_grad_norm": 1e5}
SETTINGS = {
    "epochs": 1,
    "steps": STEPS,
    "samples_per_epoch": SAMPLES,
    "samples_per_update": SAMPLES,
    "micro_batch": SAMPLES,
    "decode_batch": 3,  # not all at once
    "loss_weight": 0.5,
}
VARIANTS = {
    "draft, K = 1": {"algorithm": "draft"},
    "draft, K = 2": {"algorithm": "draft", "last_steps": 2},
    "draft, K = T": {"algorithm": "draft", "last_steps": STEPS},
    "draft-lv": {"algorithm": "draft", "renoised": 2},
    "alignprop": {"algorithm": "alignprop", "truncation": {"mean": 0.5, "std": 0.3}},
    "alignprop, uniform, with a target": {
        "algorithm": "alignprop",
        "truncation": {"first": "uniform"},
        "reward_target": -8.75,  # between the rewards
    },
    "alignprop, fixed": {"algorithm": "alignprop", "truncation": {"first": "fixed", "last_steps": 2}},
    "refl": {"algorithm": "refl", "earliest": 0.25},
    "refl with a cap": {"algorithm": "refl", "earliest": 0.25, "reward_cap": -8.75},
}


class Layers(nn.Module):
    """Two layers in a list, as the encoders of rewards have."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()) for _ in range(2))
        for i, parameter in enumerate(self.parameters()):
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = layer(images)
        return images


class Smooth(Brightness):
    """A reward with a network, of no special form."""

    name = "smooth"

    def __init__(self):
        self.encoder = Layers()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        weight = torch.tensor([100 + len(prompt) for prompt in prompts])
        return weight * self.encoder(images).mean(dim=(1, 2, 3))


def training_of(path, make_policy, **settings) -> Training:
    run = new_run(path, **SETTINGS | settings)
    config = run.config
    policy = make_policy(steps=config.steps, trained=True, gradient_checkpointing=config.policy.gradient_checkpointing)
    return Training(config, policy, Smooth(), {}, run, Accelerator(cpu=True))


def updated(training: Training) -> dict[str, Tensor]:
    """The gradient of the first update, by parameter."""
    (group,) = training.method.groups(1)
    training.method.update(group)
    return {name: parameter.grad.clone() for name, parameter in training.policy.trainable.parameters.items()}


# --- what each method maximises, one sample at a time -----------------------------------------------------------------


def objective(training: Training, base: dict[str, Tensor]) -> float:
    """The loss of the first update as a function of the current weights; steps without gradient take those of `base`.

    Written from the definitions: one sample at a time, diffusers' schedule, no part of the methods.
    """
    config, policy = training.config, training.policy
    prompts, seeds = training.context.draws(range(SAMPLES))
    total = 0.0
    for prompt, seed, noise in zip(prompts, seeds, draw_noise(policy, seeds), strict=True):
        if config.algorithm == "alignprop":
            first = first_step(config.truncation, STEPS, generator_at(*seed, "truncation"))
        elif config.algorithm == "refl":
            first = drawn_step(config.earliest, STEPS, generator_at(*seed, "step"))
        else:
            first = STEPS if config.renoised else STEPS - config.last_steps
        latents, clean = noise[:1].double(), None
        for k in range(STEPS):
            latents, clean = one_step(policy, latents, k, prompt, noise[k + 1], base if k < first else None)
            if config.algorithm == "refl" and k == first:
                break
        rewards = [clean if config.algorithm == "refl" else latents]
        if config.algorithm == "draft" and config.renoised:
            abar = policy.model.scheduler.alphas_cumprod[int(policy.process.times[-1])].double()
            pairs = torch.randn(2, 2, *policy.latent_shape, generator=generator_at(*seed, "renoised"))
            rewards = [
                one_step(policy, abar.sqrt() * latents + (1 - abar).sqrt() * before, STEPS - 1, prompt, during)[0]
                for before, during in pairs
            ]
        for latent in rewards:
            total += loss(config, training.context.reward.score(policy.decode(latent), [prompt]).item())
    return config.loss_weight * total / SAMPLES


def one_step(policy, latents, k, prompt, noise, weights=None) -> tuple[Tensor, Tensor]:
    parameters = policy.trainable.parameters
    with swapped(parameters, weights if weights else {name: p.data for name, p in parameters.items()}):
        mean, sigma, clean = policy.step(latents, torch.tensor([k]), policy.encode_prompts([prompt]))
    return mean + sigma * noise, clean


def loss(config, reward: float) -> float:
    if config.algorithm == "alignprop" and config.reward_target is not None:
        return abs(config.reward_target - reward)
    if config.algorithm == "refl" and isinstance(config.reward_cap, float):
        return max(config.reward_cap - reward, 0.0)
    return -reward


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_that_of_central_differences(variant, tmp_path, make_policy, monkeypatch):
    """Every number in float64. In a random direction the slope is as large as the gradient's norm, of which the
    difference misses less than a part in 100,000: its step squared is 1e-8, and some pixels are at the clamp's edge.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    double = lambda **settings: make_policy(dtype=torch.float64, **settings)  # noqa: E731
    training = training_of(tmp_path / "run", double, policy=UNCLIPPED, **VARIANTS[variant])
    training.context.reward.encoder.double()
    parameters = training.policy.trainable.parameters
    base = copied(parameters)
    gradient = updated(training)
    size = math.sqrt(sum(part.square().sum().item() for part in gradient.values()))
    assert size > 1e-6
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            way = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in base.items()}
            ahead, behind = (slope_at(training, base, way, step) for step in (1e-4, -1e-4))
            expected = sum((gradient[name] * way[name]).sum() for name in base).item()
            assert (ahead - behind) / 2e-4 == pytest.approx(expected, rel=0, abs=1e-5 * size)


def slope_at(training: Training, base: dict[str, Tensor], way: dict[str, Tensor], step: float) -> float:
    moved = {name: base[name] + step * way[name] for name in base}
    with swapped(training.policy.trainable.parameters, moved):
        return objective(training, base)


# --- plain autograd ---------------------------------------------------------------------------------------------------

RECOMPUTED = {
    "nothing": {},
    "steps": {"recompute": {"steps": True}},
    "decoder": {"recompute": {"decoder": True}},
    "reward": {"recompute": {"reward": True}},
    "everything": {
        "recompute": {"steps": True, "decoder": True, "reward": True},
        "policy": UNCLIPPED | {"gradient_checkpointing": True},
    },
}
WHOLE = {
    "draft": {"algorithm": "draft", "last_steps": STEPS},
    "alignprop": {"algorithm": "alignprop", "truncation": {"first": "fixed", "last_steps": STEPS}},
}


@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("algorithm", WHOLE)
def test_through_all_steps_it_is_plain_autograd(algorithm, recompute, tmp_path, make_policy):
    """However the activations are kept, and in micro-batches of any size."""
    settings = {"recompute": {"steps": False}, "policy": UNCLIPPED, "micro_batch": 2} | WHOLE[algorithm]
    training = training_of(tmp_path / "run", make_policy, **settings | RECOMPUTED[recompute])
    policy, (prompts, seeds) = training.policy, training.context.draws(range(SAMPLES))
    latents = denoise(policy, prompts, draw_noise(policy, seeds)).latents[:, -1]
    reward = training.context.reward.score(policy.decode(latents), prompts).mean()
    expected = torch.autograd.grad(-SETTINGS["loss_weight"] * reward, policy.parameters)
    found = list(updated(training).values())
    assert max(part.abs().max() for part in expected) > 1e-4
    # sums of the same float32 terms in another order
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("recompute", "kind", "forwards"),
    [
        ("nothing", BasicTransformerBlock, 1),
        ("steps", BasicTransformerBlock, 2),
        ("nothing", ResnetBlock2D, 1),
        ("decoder", ResnetBlock2D, 2),
        ("nothing", nn.Conv2d, 1),
        ("reward", nn.Conv2d, 2),
    ],
)
def test_recomputing_is_in_effect_and_leaves_no_trace(recompute, kind, forwards, tmp_path, make_policy):
    settings = {"recompute": {"steps": False}} | WHOLE["draft"] | RECOMPUTED[recompute]
    training = training_of(tmp_path / "run", make_policy, **settings)
    model, encoder = training.policy.model, training.context.reward.encoder
    decoder = model.decode.network.decoder
    # of a block that is computed again, a hook sees what is in it and not itself
    network = {BasicTransformerBlock: model.network, ResnetBlock2D: decoder.up_blocks, nn.Conv2d: encoder}[kind]
    calls: list[nn.Module] = []
    for module in network.modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(lambda module, _: calls.append(module))
    expected = {BasicTransformerBlock: STEPS, ResnetBlock2D: 2, nn.Conv2d: 2}[kind]  # 4 images, 3 at once
    updated(training)
    assert calls and all(calls.count(module) == forwards * expected for module in calls)
    left = [module for part in (decoder, encoder) for module in part.modules() if "forward" in vars(module)]
    assert left == []


# --- closed forms -----------------------------------------------------------------------------------------------------


def tinted(path, **settings) -> Training:
    """A model of one linear layer, whose decoder halves: no pixel is saturated, and brightness is linear."""
    run = new_run(path, guidance=1.0, resolution=8, **SETTINGS | {"loss_weight": 1.0, "policy": UNCLIPPED} | settings)
    policy = DiffusionPolicy(TintModel(), steps=run.config.steps, guidance=1.0, resolution=8)
    policy.model.decode = Unclamped()
    for i, parameter in enumerate(policy.parameters):
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    return Training(run.config, policy, Brightness(), {}, run, Accelerator(cpu=True))


class Unclamped:
    factor = 1

    def __call__(self, latents: Tensor) -> Tensor:
        return latents / 2 + 0.5


@pytest.mark.parametrize("algorithm", ["draft", "refl"])
def test_of_a_linear_model_it_is_the_weight_of_the_step(algorithm, tmp_path):
    """d loss / d B is -1/(2 C H W) of an output that moves mu by c_k, or x0_hat by -sqrt((1 - abar) / abar)."""
    training = tinted(tmp_path / "run", algorithm=algorithm, **({"earliest": 0.9} if algorithm == "refl" else {}))
    policy, (prompts, seeds) = training.policy, training.context.draws(range(SAMPLES))
    with torch.no_grad():
        before = denoise(policy, prompts, draw_noise(policy, seeds)).latents[:, -2]  # what enters the last step
    weights = copied(policy.trainable.parameters)
    found = updated(training)
    times, schedule = policy.process.times, policy.model.scheduler.alphas_cumprod.double()
    abar, abar_prev = schedule[times[-1]], schedule[0]
    sigma = ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    c = (1 - abar_prev - sigma**2).sqrt() - (abar_prev * (1 - abar) / abar).sqrt()
    by = c if algorithm == "draft" else -((1 - abar) / abar).sqrt()
    inputs = torch.cat([before, torch.ones_like(before[:, :1])], dim=1).double().movedim(1, -1).flatten(0, 2)
    (a,) = (weight.double() for name, weight in weights.items() if "lora_A" in name)
    (b,) = (gradient.double() for name, gradient in found.items() if "lora_B" in name)
    # the output falls by B A x, of which there are 64 a sample; brightness is the mean over 3 * 64 numbers
    row = by * (inputs @ a.T).sum(0) / (2 * 3 * 64) / SAMPLES
    torch.testing.assert_close(b, row.expand(3, -1), rtol=1e-4, atol=1e-7)  # float32, and sums of many terms


def test_rewards_above_the_cap_have_no_gradient(tmp_path):
    training = tinted(tmp_path / "run", algorithm="refl", reward_cap=-1e3)
    assert all(not gradient.any() for gradient in updated(training).values())
    assert training.context.progress.sums["policy/capped_rewards"] == 1


def test_the_cap_is_that_of_imagereward_alone(tmp_path):
    training = tinted(tmp_path / "run", algorithm="refl")
    assert math.isinf(training.method.cap)
    training.method.config = training.config.model_copy(update={"rewards": {"imagereward": 1.0}})
    assert training.method.cap == 2.0
    training.method.config = training.config.model_copy(update={"reward_cap": None, "rewards": {"imagereward": 1.0}})
    assert math.isinf(training.method.cap)


# --- what is drawn ----------------------------------------------------------------------------------------------------

DRAWS = 20_000


def frequencies(draw) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(generator) for _ in range(DRAWS)]
    return {value: drawn.count(value) / DRAWS for value in sorted(set(drawn))}


def check_frequencies(found: dict[int, float], expected: dict[int, float]) -> None:
    """Each within 4.5 standard errors: of 50 of them, one misses by chance in 3,000 such tests."""
    assert set(found) <= {value for value, share in expected.items() if share > 0}
    for value, share in expected.items():
        assert abs(found.get(value, 0.0) - share) < 4.5 * math.sqrt(share * (1 - share) / DRAWS) + 1e-12, value


def test_alignprops_first_step_is_the_authors():
    """int(Normal(42, 5)) of 50 steps, drawn again until it is in 1 ... 49; so 9.1 steps have a gradient on average."""
    settings = TruncationSettings()
    found = frequencies(lambda generator: first_step(settings, 50, generator))
    bell = {b: norm.cdf((b + 1 - 42) / 5) - norm.cdf((b - 42) / 5) for b in range(1, 50)}
    expected = {b: share / sum(bell.values()) for b, share in bell.items()}
    check_frequencies(found, expected)
    assert 50 - sum(b * share for b, share in found.items()) == pytest.approx(9.1, abs=0.15)


def test_the_other_steps_are_drawn_uniformly():
    uniform = frequencies(lambda generator: first_step(TruncationSettings(first="uniform"), 10, generator))
    check_frequencies(uniform, dict.fromkeys(range(10), 0.1))
    refl = frequencies(lambda generator: drawn_step(0.75, 40, generator))
    check_frequencies(refl, dict.fromkeys(range(30, 40), 0.1))
    assert frequencies(lambda generator: drawn_step(0.99, 10, generator)) == {9: 1.0}  # the last step always counts


@pytest.mark.parametrize("variant", ["alignprop", "draft-lv", "refl"])
def test_the_images_are_those_that_sampling_draws(variant, tmp_path, make_policy):
    """Whatever has a gradient, the samples of an epoch are those of the policy, with the rewards of the images."""
    training = training_of(tmp_path / "run", make_policy, **VARIANTS[variant] | {"micro_batch": 2})
    policy, (prompts, seeds) = training.policy, training.context.draws(range(SAMPLES))
    with torch.no_grad():
        latents = denoise(policy, prompts, draw_noise(policy, seeds)).latents[:, -1]
        images = policy.decode(latents)
    updated(training)
    batch = training.context.progress.batch()
    assert batch.prompts == prompts
    # float32, in batches of other sizes
    torch.testing.assert_close(batch.rewards, training.context.reward.score(images, prompts), rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.final_embeds, training.context.reward.embed(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("variant", "queries"), [("draft, K = 1", 4), ("draft-lv", 8), ("refl", 4)])
def test_metrics_count_what_the_update_asked_for(variant, queries, tmp_path, make_policy):
    training = training_of(tmp_path / "run", make_policy, **VARIANTS[variant], output={"grid_images": 1})
    (metrics,) = training.epochs()
    assert metrics["reward_queries"] == queries
    assert 0 <= metrics["policy/saturated_pixels"] <= 1 and math.isfinite(metrics["policy/loss"])


@pytest.mark.parametrize("variant", ["draft, K = 1", "alignprop"])
def test_memory_that_runs_out_after_a_gradient_counts_it_once(variant, tmp_path, make_policy):
    """Of the first images' rewards, before what else is measured of them is known."""
    found = []
    for short in (False, True):
        training = training_of(tmp_path / str(short), make_policy, **VARIANTS[variant])
        errors, measure = [torch.OutOfMemoryError("CUDA out of memory")] * short, training.method._measure

        def measure_if_it_fits(*arguments, errors=errors, measure=measure):
            if errors:
                raise errors.pop()
            return measure(*arguments)

        training.method._measure = measure_if_it_fits
        found.append(updated(training))
        assert training.context.decoder.batch == training.config.decode_batch // (1 + short)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)  # float32, in another order


def test_micro_batches_change_nothing(tmp_path, make_policy):
    whole, parts = (
        updated(training_of(tmp_path / str(rows), make_policy, **VARIANTS["alignprop"] | {"micro_batch": rows}))
        for rows in (4, 1)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)  # float32, in another order


# --- what cannot be trained on ----------------------------------------------------------------------------------------

FUNCTIONS = """
import torch

def red(images, prompts):
    return images[:, 0].mean((1, 2))

def says_so(images, prompts):
    return red(images, prompts)

says_so.differentiable = True

def lies(images, prompts):
    return red(images.detach(), prompts)

lies.differentiable = True
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "graded_or_not.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(function, "_allowed", True)


def run_with(path: Path, name: str, **settings) -> RunFolder:
    return new_run(path, algorithm="draft", rewards={f"python:graded_or_not:{name}": 1.0}, **settings)


def test_a_function_that_does_not_say_so_is_refused_before_anything_is_loaded(tmp_path, functions, monkeypatch):
    monkeypatch.setattr(assembling, "load_rewards", lambda *_: pytest.fail("a reward was loaded"))
    run = run_with(tmp_path / "run", "red")
    with pytest.raises(
        ValueError, match=r"write red\.differentiable = True below it, or choose another algorithm"
    ) as error:
        assembling.assemble(run.config, run, cpu=True)
    assert "\n" not in str(error.value)


def test_a_function_that_says_so_is_trained_on(tmp_path, functions):
    small = {"samples_per_epoch": 2, "samples_per_update": 2, "steps": 2, "epochs": 1}
    run = run_with(tmp_path / "run", "says_so", **small)
    (metrics,) = assembling.assemble(run.config, run, cpu=True).epochs()
    assert "reward/python:graded_or_not:says_so/mean" in metrics
    lying = run_with(tmp_path / "lying", "lies", **small)
    with pytest.raises(RewardError, match="lies.*have no gradient; compute them with torch, without detach"):
        list(assembling.assemble(lying.config, lying, cpu=True).epochs())


def test_a_reward_of_somebody_elses_is_asked(tmp_path, make_policy, monkeypatch):
    """Its name alone does not tell."""
    monkeypatch.setattr(Smooth, "differentiable", False)
    with pytest.raises(ValueError, match="got reward 'smooth', which has no gradient, for algorithm draft"):
        training_of(tmp_path / "run", make_policy, algorithm="draft")


def test_the_networks_of_sums_and_tastes_are_found():
    """Those that a reward reads through, too."""

    class Through(Brightness):
        def __init__(self, encoder):
            self.encoder = encoder

    inner = Smooth()
    summed = WeightedSum([(Brightness(), 2.0, 1.0), (Through(inner), 1.0, 1.0)])
    assert networks_of(summed) == [inner.encoder]
    assert blocks_of(inner.encoder) == list(inner.encoder.layers)


def test_an_encoder_that_two_rewards_share_is_recomputed_once():
    both = load_rewards({"shapes-aesthetic": 1.0, "shapes-alignment": 1.0}, torch.device("cpu"))
    layers = blocks_of(networks_of(both)[0])
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (plain,) = torch.autograd.grad(both.score(images, ["a red circle"] * 2).sum(), images)
    with recomputing(networks_of(both)):
        assert all("forward" in vars(layer) for layer in layers)
        (found,) = torch.autograd.grad(both.score(images, ["a red circle"] * 2).sum(), images)
    assert layers and not any("forward" in vars(layer) for layer in layers)
    assert torch.equal(found, plain) and plain.any()
