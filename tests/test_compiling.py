"""Compiled blocks: sampling and training run the same code, and a run is what it is without, up to rounding."""

import shutil
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
from torch import nn
from torch._dynamo.utils import counters
from toy import lora_of, new_run, same, timeless, toy_training

from comfy_tdpo import compiling, torch_release
from comfy_tdpo.compiling import CompiledBlocks
from comfy_tdpo.nodes.runs.wording import in_words_of_nodes
from comfy_tdpo.swapping import swapped
from comfy_tdpo.trainer.assemble import assemble
from comfy_tdpo.trainer.config import make_config, override
from comfy_tdpo.trainer.lookout import LOADING, patience
from comfy_tdpo.trainer.run import RunFolder

pytestmark = pytest.mark.skipif(
    torch.__version__ < torch_release.OLDEST, reason="this torch is older than what was tried"
)


@pytest.fixture
def without_compiler(monkeypatch):
    """torch makes the same graphs, but runs them operation by operation, which needs no compiler and rounds as ever."""
    monkeypatch.setattr(
        compiling, "compiled", partial(torch.compile, backend="aot_eager", dynamic=False, fullgraph=True)
    )
    yield
    torch.compiler.reset()


def test_a_run_is_what_it_is_without_and_resumes(tmp_path, make_policy, without_compiler):
    """With all that a run does to its network: the LoRA off, hooks on its neurons, checkpointing, sample grids."""

    def training(run, compiled):
        found = toy_training(run, make_policy)
        found.policy.turn_on_checkpointing()
        if compiled:
            found.policy.compile()
        return found

    small = {"epochs": 2, "samples_per_epoch": 4, "samples_per_update": 2, "steps": 3, "output": {"grid_images": 3}}
    more = {"kl": {"coefficient": 0.1}, "neurons": {"every": 1, "policy_reset": "active"}}
    plain, run = (new_run(tmp_path / name, **small, **more) for name in ("plain", "compiled"))
    expected, whole, made = training(plain, False), training(run, True), counters["stats"]["unique_graphs"]
    epochs = whole.epochs()
    metrics = [next(epochs)]
    shutil.copytree(run.path, tmp_path / "stopped")
    metrics = timeless([*metrics, *epochs])
    assert metrics == timeless(list(expected.epochs())) and same(lora_of(whole), lora_of(expected))
    assert [line["policy/ratio_drift"] for line in metrics] == [0, 0] and metrics[1]["kl/nats"] > 0
    # at the two sizes of the U-Net's blocks, with the LoRA and without; not for the grids, which have other sizes
    assert counters["stats"]["unique_graphs"] == made + 4
    resumed = training(RunFolder(tmp_path / "stopped"), True)
    assert timeless(list(resumed.epochs())) == metrics[1:] and same(lora_of(resumed), lora_of(whole))


class TinyTransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return x + F.gelu(F.layer_norm(self.layer(x), (8,)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU by g++, which is not installed")
def test_one_graph_serves_sampling_and_training(monkeypatch, generator):
    torch.compiler.reset()
    device = torch.device("cpu")
    compiling.check(device)
    network, x = nn.Sequential(TinyTransformerBlock()), torch.randn(3, 5, 8, generator=generator)
    names, parameters = list(network.state_dict()), dict(network.named_parameters())
    others = {name: torch.randn(weight.shape, generator=generator) for name, weight in parameters.items()}
    plain = network(x)
    plain.sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in parameters.items()}
    network.zero_grad()
    with torch.no_grad(), swapped(parameters, others):
        plain_of_others = network(x)

    blocks, made = CompiledBlocks(network, "a model"), counters["stats"]["unique_graphs"]
    with torch.no_grad():
        sampled = network(x)
        with swapped(parameters, others):
            torch.testing.assert_close(network(x), plain_of_others)
    trained = network(x)
    assert torch.equal(sampled, trained) and torch.equal(sampled, network(x.clone().requires_grad_()))
    assert counters["stats"]["unique_graphs"] == made + 1
    assert trained.requires_grad and not sampled.requires_grad and not x.requires_grad
    trained.sum().backward()
    # fused, float32: the default tolerances
    torch.testing.assert_close(trained, plain)
    torch.testing.assert_close({name: weight.grad for name, weight in parameters.items()}, gradients)
    with blocks.off():
        assert torch.equal(network(x), plain)
    assert list(network.state_dict()) == names
    monkeypatch.setattr(compiling, "MOST", 1)
    with pytest.raises(ValueError, match="torch cannot compile .FailOnRecompileLimitHit: .* resume the run with"):
        network(x[:2])
    torch.compiler.reset()


def test_the_blocks_of_every_family_are_found():
    """By the names of what diffusers leaves on one device."""
    for family in (UNet2DConditionModel, SD3Transformer2DModel, FluxTransformer2DModel, ZImageTransformer2DModel):
        assert any(name.endswith(compiling.BLOCK) for name in family._no_split_modules)


def test_what_is_missing_is_named_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(torch_release, "OLDEST", (99, 0))
    with pytest.raises(ValueError, match=r"with torch 2.*; expected 99.0 or newer"):
        compiling.check(torch.device("cpu"))
    monkeypatch.undo()
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="without the package triton; expected triton .* to false$") as caught:
        compiling.check(torch.device("cuda"))
    assert in_words_of_nodes(str(caught.value)).endswith("set compile (in settings) to false")
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # or what was compiled earlier is loaded
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(
            ValueError, match="no-such-compiler.*expected a C\\+\\+ compiler .*: install it, or set compile to"
        ),
    ):
        compiling.check(torch.device("cpu"))
    with pytest.raises(ValueError, match="blobs, which has no transformer blocks"):
        CompiledBlocks(nn.Linear(2, 2), "blobs")


def test_a_run_asks_for_it(tmp_path, without_compiler, monkeypatch):
    run = new_run(tmp_path / "run", compile=True, rewards={"jpeg-compressibility": 1.0})
    assert assemble(run.config, run, cpu=True).policy._compiled.blocks
    monkeypatch.setattr(torch_release, "OLDEST", (99, 0))
    with pytest.raises(ValueError, match="compile true"):
        assemble(run.config, run, cpu=True)


def test_it_does_not_change_while_samples_wait_for_their_updates(tmp_path, make_policy, caplog):
    """What compiles is not asked for, only what the settings say of it."""
    small = {"epochs": 1, "samples_per_epoch": 4, "samples_per_update": 2, "micro_batch": 2, "steps": 3}
    for phase in ("sampling", "updating"):
        run, stop = new_run(tmp_path / phase, **small), threading.Event()

        def watch(now: str, done: float, total: int, phase=phase, stop=stop) -> None:
            if now == phase and done >= 2:  # a micro-batch, or two updates
                stop.set()

        list(toy_training(run, make_policy, stop, watch).epochs())
        run.write_config(override(run.config, {"compile": True}))
        resumed = toy_training(RunFolder.open(run.path), make_policy)
        if phase == "sampling":
            assert len(list(resumed.epochs())) == 1
            assert (
                "stopped while sampling with compile false, and resumes with true: epoch 1 starts over" in caplog.text
            )
        else:
            with pytest.raises(ValueError, match="got compile true .* stopped in the updates of epoch 1 .* to false$"):
                list(resumed.epochs())


def test_settings():
    with pytest.raises(ValueError, match="compile is true, but draft draws with gradients"):
        make_config(overrides={"algorithm": "draft", "compile": True})
    config = make_config(overrides={"hang_limit": 60})
    assert (patience(config), patience(config.model_copy(update={"compile": True}))) == (60, LOADING)
