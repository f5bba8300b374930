"""A run that was stopped at any moment and continued is the run that was never stopped, to the last bit."""

import json
import shutil
import threading
from itertools import groupby
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import Brightness, Contrast, fast_training, lora_of, new_run, same, timeless, toy_config, toy_training

from comfy_tdpo.models.tiny_decoder import new_tiny_decoder, original_weights
from comfy_tdpo.prompts import load_prompts
from comfy_tdpo.rewards import WeightedSum
from comfy_tdpo.trainer.config import override
from comfy_tdpo.trainer.metrics import reward_names
from comfy_tdpo.trainer.overoptimisation import Overoptimisation
from comfy_tdpo.trainer.run import RunFolder, TrainingError
from comfy_tdpo.trainer.run.checkpoint import load_latest, save_checkpoint

VARIANTS = {
    "tdpo-r with kl and resets of the policy": {
        "kl": {"coefficient": 0.1, "target": 1.0, "horizon": 50},
        "neurons": {"every": 2, "policy_reset": "dormant", "data": "batch"},
        "samples_per_epoch": 4,  # one update per timestep
    },
    "guards, groups, a reference that moves, a controller and a trust region": {
        "policy": {"objective": "trust-region"},
        "samples_per_epoch": 4,
        "kl": {
            "coefficient": 0.1,
            "target": 1.0,
            "controller": "proportional-integral",
            "reset_every": 1,
            "gate": True,
            "gate_share": 0.5,
            "gate_window": 1,
        },
        "guards": ["shapes-alignment"],
        "samples_per_prompt": 2,
        "moments": {"baseline": "group"},
        "favour_diversity": True,
    },
    # two epochs, as nothing but what neurons were reset reaches further
    "tdpo-r": {"epochs": 2, "critic": {"decoder": "tiny", "read_every": 2}},
    "a critic trained on earlier epochs, an average, a schedule and a window": {
        "critic": {
            "reads": "clean",
            "prompt": True,
            "step": True,
            "architecture": "standardised",
            "activation": "relu",
            "history": 2,
            "scores": True,
            "gae_lambda": 0.9,
        },
        "guards": ["shapes-match", "shapes-alignment"],
        "guard_images": 2,
        "guard_adaptation": 0.5,
        "prompts": "shapes-complex",
        "policy": {
            "objective": "step-normalised",
            "ema": 0.5,
            "lr_schedule": "cosine",
            "warmup_updates": 2,
            "train_until": 0.7,
            "train_share": 0.5,
        },
        "neurons": {"every": 1, "policy_reset": "dormant"},
        "samples_per_epoch": 4,
        "guidance": 1.0,
        "eval_guidance": 3.0,
    },
    "ddpo-2": {"algorithm": "ddpo-2", "epochs": 2},
    "ddpo-100": {"algorithm": "ddpo-100", "epochs": 2},
    "a replay buffer and resets of the policy": {
        "kl": {"coefficient": 0.1},
        "neurons": {"every": 2, "policy_reset": "active"},
        "policy": {"replay": 1, "objective": "step-normalised"},
        "samples_per_epoch": 4,
    },
    "sdpo": {"algorithm": "sdpo", "epochs": 2, "steps": 4, "prompts": "shapes-complex"},
    "dpok": {"algorithm": "dpok", "epochs": 2},
    "grpo": {"algorithm": "grpo", "epochs": 2, "samples_per_prompt": 4},
    "ddpo-100 without a clip": {"algorithm": "ddpo-100", "advantage_clip": None, "epochs": 2},
    "alignprop": {"algorithm": "alignprop", "truncation": {"first": "uniform"}, "epochs": 2},
    "draft-lv": {"algorithm": "draft", "renoised": 2, "epochs": 2},
    "refl": {"algorithm": "refl", "epochs": 2},
    "all weights, an average and a reference that moves": {
        "policy": {"train": "full", "ema": 0.5},
        "kl": {"coefficient": 0.1, "reset_every": 1},
        "samples_per_epoch": 4,
        "epochs": 2,
    },
    "tdpo-r in fp16": {"precision": "fp16", "policy": {"ema": 0.5}, "epochs": 2},
    "draft in fp16": {"algorithm": "draft", "precision": "fp16", "epochs": 2},
    "all weights in bf16, by back-propagation": {
        "algorithm": "draft",
        "policy": {"train": "full", "optimizer": "adamw-8bit"},
        "precision": "bf16",
        "epochs": 2,
    },
}


@pytest.fixture(autouse=True)
def tiny_decoder(tmp_path, monkeypatch) -> None:
    """One for the latents of the tiny model, in the place of that which ships."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = original_weights(new_tiny_decoder(4, width=4, blocks=(1, 0)))
    save_file(weights, tmp_path / "tiny.safetensors")
    monkeypatch.setattr("comfy_tdpo.methods.decoder.TINY_DECODER", tmp_path / "tiny.safetensors")


class Steps:
    """A watch that counts what is begun: micro-batches, updates, grids; not the model calls within them."""

    count = 0

    def __call__(self, phase: str, done: float, total: int) -> None:
        self.count += isinstance(done, int)


class StopAt(Steps):
    """A watch that sets the stop event when the n-th of them is begun."""

    def __init__(self, stop: threading.Event, step: int):
        self.stop, self.step = stop, step

    def __call__(self, phase: str, done: float, total: int) -> None:
        super().__call__(phase, done, total)
        if self.count == self.step:
            self.stop.set()


def whole_run(path, make_policy, watch=lambda *call: None, **overrides):
    run = new_run(path, **overrides)
    training = toy_training(run, make_policy, watch=watch)
    list(training.epochs())
    return run, training


def files_in(folder):
    """What the files in `folder` hold, but for the lock, which is empty."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_the_rewards_of_a_sum_are_measured_also_over_a_stop_in_mid_epoch(tmp_path):
    """Each in its own unit; also if the first part of the epoch is from a version that did not keep them."""

    def train(run, stop=None, watch=lambda *call: None):
        reward = WeightedSum([(Brightness(), 1.0, 1.0), (Contrast(), 0.5, 0.1)])
        return list(fast_training(run, reward, stop=stop, watch=watch).epochs())

    whole = new_run(tmp_path / "whole")
    (first, *_), name = train(whole), "brightness + 0.5 contrast / 0.1"
    parts = [first[f"reward/{part}/mean"] for part in ("brightness", "contrast")]
    assert first[f"reward/{name}/mean"] == pytest.approx(parts[0] + 5 * parts[1], rel=1e-6)  # float32
    assert reward_names([first], "reward") == [name] and reward_names([first], "part") == ["brightness", "contrast"]

    for version in ("this", "older"):
        run, stop = new_run(tmp_path / version), threading.Event()
        train(run, stop, lambda phase, done, total, stop=stop: stop.set() if (phase, done) == ("sampling", 4) else None)
        if version == "older":
            tensors, state = load_latest(run.checkpoints)
            kept = {group: content for group, content in tensors.items() if group != "part_rewards"}
            shutil.rmtree(run.checkpoints)
            save_checkpoint(run.checkpoints, state.pop("name"), kept, state | {"groups": sorted(kept)}, keep=1)
        train(run)
        if version == "this":
            assert timeless(run.metrics()) == timeless(whole.metrics())
    assert reward_names(run.metrics()[:1], "part") == []
    assert reward_names(run.metrics(), "part") == ["brightness", "contrast"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_anywhere_and_continued_it_ends_the_same(variant, tmp_path, make_policy):
    overrides, steps = VARIANTS[variant], Steps()
    whole, reference = whole_run(tmp_path / "whole", make_policy, steps, **overrides)
    first_stop = 1 + 3 * list(VARIANTS).index(variant)  # together the variants stop at every third step
    for step in range(first_stop, steps.count + 1, 3 * len(VARIANTS)):
        run = new_run(tmp_path / f"stopped-{step}", **overrides)
        stop = threading.Event()
        first = toy_training(run, make_policy, stop, StopAt(stop, step))
        list(first.epochs())
        at_its_end = first.context.epoch == run.config.epochs  # a stop after the last update finds nothing to stop
        assert first.stopped or at_its_end
        second = toy_training(RunFolder.open(run.path), make_policy)
        list(second.epochs())
        assert same(lora_of(second), lora_of(reference)), f"stopped at step {step}"
        assert timeless(run.metrics()) == timeless(whole.metrics()), f"stopped at step {step}"
        a, b = load_file(run.latest_lora), load_file(whole.latest_lora)
        assert a.keys() == b.keys() and same(list(a.values()), [b[key] for key in a])


def test_progress_is_told_with_every_model_call_and_never_goes_back(tmp_path, make_policy):
    """In samples or updates of a phase; what is begun is whole, and a micro-batch of two has three steps and more."""
    (tmp_path / "few.txt").write_text("a red circle\na green star\n")
    guarded = {"algorithm": "tdpo-g", "guards": ["shapes-alignment"], "guard_images": 3, "epochs": 1}
    run, told = new_run(tmp_path / "run", prompts=str(tmp_path / "few.txt"), **guarded), []
    list(toy_training(run, make_policy, watch=lambda *call: told.append(call)).epochs())
    phases = [(phase, [call[1:] for call in calls]) for phase, calls in groupby(told, key=lambda call: call[0])]
    assert [phase for phase, _ in phases] == [
        *("drawing samples", "sampling", "drawing for guards", "updating", "drawing samples"),
    ]
    for phase, calls in phases:
        dones, (total, *_) = [done for done, _ in calls], [total for _, total in calls]
        assert dones == sorted(dones) and dones[0] == 0 and total - 1 < dones[-1] < total, phase
        if phase == "sampling":
            first = [done for done in dones if done < 2]
            assert first == sorted(set(first)) and len(first) > run.config.steps, "a decoding or more follow the steps"


def test_a_run_may_be_stopped_and_continued_many_times(tmp_path, make_policy):
    whole, reference = whole_run(tmp_path / "whole", make_policy)
    run, training = new_run(tmp_path / "hopping"), None
    for _ in range(100):
        stop = threading.Event()
        training = toy_training(run, make_policy, stop, StopAt(stop, 4))
        list(training.epochs())
        if not training.stopped:
            break
    assert training is not None and not training.stopped
    assert same(lora_of(training), lora_of(reference))
    assert timeless(run.metrics()) == timeless(whole.metrics())


def test_a_stop_in_mid_epoch_does_not_lose_the_epochs_samples(tmp_path, make_policy):
    run, stop, seen = new_run(tmp_path / "run"), threading.Event(), []

    def watch(phase, done, total):
        if phase == "updating" and done == 2:
            stop.set()

    list(toy_training(run, make_policy, stop, watch).epochs())
    list(toy_training(run, make_policy, watch=lambda phase, done, total: seen.append((phase, done))).epochs())
    assert seen[0] == ("updating", 2)


def test_held_out_rewards_may_change_even_in_mid_epoch(tmp_path, make_policy):
    whole, trained = whole_run(tmp_path / "whole", make_policy)
    run, stop = new_run(tmp_path / "run"), threading.Event()

    def watch(phase, done, total):
        if (phase, done, len(run.metrics())) == ("sampling", 4, 1):
            stop.set()

    list(toy_training(run, make_policy, stop, watch, held_out={"old": Brightness()}).epochs())
    run.write_config(toy_config(eval_rewards=["shapes-judge"], overoptimisation={"reward": "shapes-match"}))
    again = toy_training(run, make_policy, held_out={"shapes-match": Contrast()})
    list(again.epochs())
    assert same(lora_of(again), lora_of(trained)), "held-out rewards change nothing"
    measured = [
        sorted(key for key in line if key.startswith("eval/") and key.endswith("mean")) for line in run.metrics()
    ]
    assert measured == [["eval/old/mean"], [], ["eval/shapes-match/mean"]], "half an epoch is not measured"
    assert len(again.overoptimisation.tensors()["scores"]) == 1


def test_another_watched_reward_is_watched_from_then_on(tmp_path, make_policy, monkeypatch):
    """And the old one's alarm rings no more."""
    run = new_run(tmp_path / "run", epochs=2, overoptimisation={"reward": "shapes-judge"})
    alarm = {"overoptimisation/since": 2, "overoptimisation/fall": 1.0, "overoptimisation/standard_errors": 9.0}
    with monkeypatch.context() as patch:
        end_epoch = Overoptimisation.end_epoch
        patch.setattr(Overoptimisation, "end_epoch", lambda *epoch: end_epoch(*epoch) | alarm)
        list(toy_training(run, make_policy, held_out={"shapes-judge": Brightness()}).epochs())
    for watched, scores in (("shapes-judge", 3), ("shapes-match", 1)):
        again = RunFolder(Path(shutil.copytree(run.path, tmp_path / watched)))
        again.write_config(toy_config(epochs=3, overoptimisation={"reward": watched}))
        training = toy_training(again, make_policy, held_out={watched: Brightness()})
        list(training.epochs())
        assert len(training.overoptimisation.tensors()["scores"]) == scores
        assert any("overoptimisation/since" in line for line in again.metrics()) == (watched == "shapes-judge")


def test_epochs_that_were_logged_but_not_checkpointed_are_logged_once(tmp_path, make_policy):
    run = new_run(tmp_path / "run", output={"checkpoint_every": 2})
    epochs = toy_training(run, make_policy).epochs()
    for _ in range(3):
        next(epochs)  # epoch 3 is the last and has a checkpoint
    (sorted(run.checkpoints.glob("epoch-0003"))[0] / "state.json").unlink()  # as if killed before it was whole
    list(toy_training(run, make_policy).epochs())
    assert [line["epoch"] for line in run.metrics()] == [1, 2, 3]


def test_a_line_cut_off_in_mid_write_is_dropped(tmp_path, make_policy):
    whole, _ = whole_run(tmp_path / "whole", make_policy)
    run, _ = whole_run(tmp_path / "run", make_policy)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "rew')
    list(toy_training(run, make_policy).epochs())
    assert timeless(run.metrics()) == timeless(whole.metrics())


def test_only_the_last_checkpoints_are_kept(tmp_path, make_policy):
    run, _ = whole_run(tmp_path / "run", make_policy, output={"keep_checkpoints": 2})
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["epoch-0002", "epoch-0003"]


def test_a_run_goes_on_from_another_folder_and_without_the_prompts_it_was_given(tmp_path, make_policy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a red circle\na green star\n")
    settings = {"prompts": "mine.txt", "grid_prompts": "mine.txt"}
    whole, _ = whole_run(tmp_path / "whole", make_policy, **settings)
    run = new_run(tmp_path / "run", **settings)
    next(toy_training(run, make_policy).epochs())
    prompts.unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    list(toy_training(run, make_policy).epochs())
    assert timeless(run.metrics()) == timeless(whole.metrics())
    assert run.sample_grid(3).read_bytes() == whole.sample_grid(3).read_bytes()


def test_a_run_that_was_killed_while_it_was_made_is_made_again(tmp_path, make_policy):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("prompts.txt", "grid-prompts.txt", ".config.toml.partial.toml"):
        (folder / name).write_text("half")
    run = new_run(folder)
    assert run.prompts(run.config) == load_prompts("shapes")


def test_a_model_keeps_its_name_and_a_file_gets_its_whole_path(tmp_path, make_policy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    (tmp_path / "mine").mkdir()
    assert new_run(tmp_path / "a").config.model == "shapes"
    assert new_run(tmp_path / "b", model="owner/name").config.model == "owner/name"
    assert new_run(tmp_path / "c", model="mine").config.model == str(tmp_path / "mine")


def test_what_a_killed_process_left_half_done_is_in_nobodys_way(tmp_path, make_policy):
    whole, _ = whole_run(tmp_path / "whole", make_policy)
    run = new_run(tmp_path / "run")
    next(toy_training(run, make_policy).epochs())
    for name in ("epoch-0002", ".epoch-0001-samples-000004-updates-000000.partial"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "policy.safetensors").write_bytes(b"half")
    list(toy_training(run, make_policy).epochs())
    assert timeless(run.metrics()) == timeless(whole.metrics())
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["epoch-0002", "epoch-0003"]
    assert all((path / "state.json").is_file() for path in run.checkpoints.iterdir())


@pytest.mark.parametrize("what", ["LoRA", "critic"])
def test_what_has_diverged_is_not_kept(tmp_path, make_policy, what):
    run = new_run(tmp_path / "run")
    training = toy_training(run, make_policy)
    epochs = training.epochs()
    next(epochs)
    before = files_in(run.path)
    with torch.no_grad():
        weights = training.policy.parameters if what == "LoRA" else list(training.method.critic.network.parameters())
        weights[0][0, 0] = torch.nan
    training.stop.set()
    with pytest.raises(TrainingError, match=f"diverged, its {what} is"):
        list(epochs)
    assert before == files_in(run.path)
    list(toy_training(run, make_policy).epochs())
    assert [line["epoch"] for line in run.metrics()] == [1, 2, 3]


DAMAGES = {
    "truncated tensors": lambda path: (path / "policy.safetensors").write_bytes(
        (path / "policy.safetensors").read_bytes()[:100]
    ),
    "missing tensors": lambda path: (path / "critic.safetensors").unlink(),
    "foreign tensors": lambda path: (path / "critic.safetensors").write_bytes(b"not a safetensors file at all"),
    "broken state": lambda path: (path / "state.json").write_text("{"),
    "another format": lambda path: (path / "state.json").write_text(json.dumps({"format": 99, "groups": []})),
    "another epoch": lambda path: edit_state(path, epoch=-5),
    "another micro-batch": lambda path: edit_state(path, micro_batch=0),
    "no groups": lambda path: edit_state(path, groups=[]),
    "tensors of another epoch": lambda path: shutil.copy(
        path.with_name("epoch-0002") / "policy_optimizer.safetensors", path
    ),
    "no sums": lambda path: (path / "SHA256SUMS").unlink(),
    "empty sums": lambda path: (path / "SHA256SUMS").write_text(""),
    "another name": lambda path: path.with_name("epoch-0002").rename(path.with_name("epoch-0003-samples")),
}


def edit_state(path, **changes):
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | changes))


@pytest.fixture(scope="module")
def finished_path(tmp_path_factory, make_policy):
    run, _ = whole_run(tmp_path_factory.mktemp("finished") / "run", make_policy)
    return run.path


@pytest.fixture
def finished(finished_path, tmp_path):
    """A finished run to do with as one likes."""
    return RunFolder.open(Path(shutil.copytree(finished_path, tmp_path / "finished")))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_nothing_is_changed(damage, finished, make_policy):
    run = finished
    DAMAGES[damage](run.checkpoints / "epoch-0003")
    before = files_in(run.path)
    with pytest.raises(ValueError, match="epoch-0003"):
        list(toy_training(run, make_policy).epochs())
    assert before == files_in(run.path)


CHANGES = {
    "rank": ({"policy": {"rank": 8}}, "policy.rank was 16 and is 8"),
    "samples of an epoch": ({"samples_per_epoch": 12}, "samples_per_epoch was 8 and is 12"),
    "no critic": ({"algorithm": "ddpo-100"}, "advantage_clip was"),
    "seed": ({"seed": 1}, "seed was 42 and is 1"),
    "weight of a reward": ({"rewards": {"shapes-aesthetic": 2.0}}, "rewards was"),
    "a guard": ({"guards": ["shapes-match"]}, "guards was"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_other_settings(change, finished, make_policy):
    run = finished
    settings, message = CHANGES[change]
    run.write_config(toy_config(**settings))
    before = files_in(run.path)
    with pytest.raises(ValueError, match=message):
        list(toy_training(run, make_policy).epochs())
    assert before == files_in(run.path)


def changed(policy, part):
    """`policy` with the last value of a weight, or its schedule, another one."""
    networks = {"unet": policy.model.network, "vae": policy.model.decode.network}
    if part == "schedule":
        policy.model.scheduler.alphas_cumprod[500] *= 1.01
    else:
        weight = max((w for w in networks[part].parameters() if not w.requires_grad), key=torch.numel)
        weight.flatten()[-1] += 1
    return policy


def test_a_run_does_not_go_on_with_another_model_or_other_prompts(finished, make_policy):
    run = finished
    for part in ("unet", "vae", "schedule"):
        with pytest.raises(ValueError, match="got a different model"):
            list(toy_training(run, lambda part=part, **settings: changed(make_policy(**settings), part)).epochs())
    (run.path / "prompts.txt").write_text("a red circle\n")
    with pytest.raises(ValueError, match="got different prompts"):
        list(toy_training(run, make_policy).epochs())


@pytest.mark.parametrize(("factor", "same_schedule"), [(1 + 1e-6, True), (1 - 1e-6, True), (1.001, False)])
def test_a_schedule_may_differ_in_its_last_bits(factor, same_schedule, finished, make_policy):
    """As it does between releases of torch, and between a CPU and a GPU."""

    def nearly(**settings):
        policy = make_policy(**settings)
        policy.model.scheduler.alphas_cumprod *= factor
        return policy

    training = toy_training(finished, nearly)
    if same_schedule:
        assert list(training.epochs()) == []
    else:
        with pytest.raises(ValueError, match="a different model"):
            list(training.epochs())


def test_a_model_may_have_a_number_for_a_weight(tmp_path, make_policy):
    """A scale, say: a tensor of no dimensions."""

    def with_number(value, **settings):
        policy = make_policy(**settings)
        scale = torch.nn.Parameter(torch.tensor(value), requires_grad=False)
        policy.model.decode.network.register_parameter("scale", scale)
        return policy

    run = new_run(tmp_path / "run", epochs=1)
    list(toy_training(run, lambda **settings: with_number(0.5, **settings)).epochs())
    assert list(toy_training(run, lambda **settings: with_number(0.5, **settings)).epochs()) == []
    with pytest.raises(ValueError, match="a different model"):
        list(toy_training(run, lambda **settings: with_number(0.25, **settings)).epochs())


def test_more_epochs_give_the_run_that_was_long_from_the_start(tmp_path, make_policy):
    whole, reference = whole_run(tmp_path / "whole", make_policy)
    run, _ = whole_run(tmp_path / "run", make_policy, epochs=2)
    run.write_config(override(run.config, {"epochs": 3}))
    longer = toy_training(run, make_policy)
    list(longer.epochs())
    assert same(lora_of(longer), lora_of(reference))
    assert timeless(run.metrics()) == timeless(whole.metrics())


@pytest.mark.parametrize("lost", ["checkpoints", "metrics too"])
def test_a_run_that_lost_its_checkpoints_is_not_begun_again(lost, finished, make_policy):
    run = finished
    shutil.rmtree(run.checkpoints)
    if lost == "metrics too":
        (run.path / "metrics.jsonl").unlink()
    before = files_in(run.path)
    with pytest.raises(ValueError, match="checkpoints are gone"):
        list(toy_training(run, make_policy).epochs())
    assert before == files_in(run.path)


@pytest.mark.parametrize(
    "line", ["3", "[1]", "{}", "null", '{"epoch": "x"}', '{"epoch": 1, "reward": null}', "\xff\xfe"]
)
def test_damaged_metrics_are_named_and_written_anew_from_the_checkpoint(line, finished, make_policy):
    run = finished
    whole, path = run.metrics(), run.path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged.*delete it"):
        run.metrics()
    path.unlink()
    list(toy_training(run, make_policy).epochs())
    assert run.metrics() == whole


@pytest.mark.parametrize("change", [lambda lora: shutil.rmtree(lora.parent), lambda lora: lora.write_bytes(b"garbage")])
def test_a_lost_lora_is_written_anew_from_the_checkpoint(change, finished, make_policy):
    run = finished
    before = run.latest_lora.read_bytes()
    change(run.latest_lora)
    list(toy_training(run, make_policy).epochs())
    assert run.latest_lora.read_bytes() == before


def test_nobody_else_writes_to_a_run_that_trains(tmp_path, make_policy):
    run = new_run(tmp_path / "run")
    epochs = toy_training(run, make_policy).epochs()
    next(epochs)
    with pytest.raises(ValueError, match="in use by another process"):
        list(toy_training(RunFolder.open(run.path), make_policy).epochs())
    epochs.close()
    list(toy_training(RunFolder.open(run.path), make_policy).epochs())
    assert len(run.metrics()) == 3
