"""Where published weights are searched for, the message if they are missing, and that nothing else is loaded."""

import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from small_rewards import CPU, REFERENCE, golden, save_small_weights, use_small_architectures
from torch import nn
from transformers import CLIPModel

from comfy_tdpo.rewards import REWARDS, hpsv2, imagereward, load_reward, reward_class, weights
from comfy_tdpo.rewards.clip import VIT_B_32, VIT_H_14, VIT_L_14, Clip, ClipImages, empty_clip
from comfy_tdpo.rewards.head import LinearHead
from comfy_tdpo.rewards.pickscore import CLIP
from comfy_tdpo.rewards.weights import Source, find_weights, load_weights

SOURCE = Source("somebody/Some-Model", "some.pt", "1 GB", "MIT", aliases=("other.pt",))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """As HF_HUB_OFFLINE=1 does, which the hub reads when it is imported; with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """A host's folder of weights."""
    monkeypatch.setattr(weights, "_folders", [])
    weights.add_weights_folder(tmp_path / "tdpo_rewards")
    (tmp_path / "tdpo_rewards").mkdir()
    return tmp_path / "tdpo_rewards"


def touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


# --- where they are


@pytest.mark.parametrize("place", ["some.pt", "other.pt", "Some-Model/some.pt"])
def test_a_folder_holds_them_under_any_of_their_names(offline, folder, tmp_path, place):
    inside = touched(folder / place)
    assert find_weights("some", SOURCE) == inside
    given = touched(tmp_path / "given" / place)
    assert find_weights("some", SOURCE, tmp_path / "given") == given
    assert find_weights("some", SOURCE, given) == given


def test_in_a_shared_folder_a_name_that_every_clip_has_says_nothing(offline, folder, tmp_path):
    touched(folder / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        find_weights("pickscore", CLIP)
    right = touched(folder / "PickScore_v1" / "model.safetensors")
    assert find_weights("pickscore", CLIP) == right
    assert find_weights("pickscore", CLIP, folder) == right


def test_the_hubs_cache_serves_offline(offline, tmp_path):
    commit = "0" * 40
    repo = tmp_path / "cache" / "models--somebody--Some-Model"
    cached = touched(repo / "snapshots" / commit / "some.pt")
    touched(repo / "refs" / "main").write_text(commit)
    assert find_weights("some", SOURCE) == cached


@pytest.mark.parametrize("name", [name for name in REWARDS if reward_class(name).sources])
def test_a_missing_file_says_what_it_is_and_where_to_put_it(offline, folder, name):
    source = reward_class(name).sources[0]
    with pytest.raises(ValueError, match="cannot be downloaded") as error:
        load_reward(name, CPU)
    for part in (name, source.file, source.repo, source.licence, source.size, str(folder), "reward_weights", "OFFLINE"):
        assert part in str(error.value)


def test_a_path_that_is_given_is_not_passed_over(offline, folder, tmp_path):
    """Not even where what is looked for lies in another place."""
    touched(folder / "some.pt")
    with pytest.raises(ValueError, match="nothing is"):
        find_weights("some", SOURCE, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="does not contain some.pt"):
        find_weights("some", SOURCE, tmp_path / "empty")


def test_a_reward_without_weights_takes_no_path(tmp_path):
    with pytest.raises(ValueError, match="'jpeg-compressibility', which has none"):
        load_reward("jpeg-compressibility", CPU, weights={"jpeg-compressibility": str(tmp_path)})


def test_a_file_stands_for_the_main_one_of_several(offline, folder, tmp_path, monkeypatch):
    """The head of aesthetic by its path, its CLIP from the host's folder."""
    use_small_architectures(monkeypatch)
    small = save_small_weights(tmp_path / "small")["aesthetic"]
    (folder / "clip-vit-large-patch14").mkdir()
    (Path(small) / "model.safetensors").rename(folder / "clip-vit-large-patch14" / "model.safetensors")
    head = Path(small) / "sac+logos+ava1-l14-linearMSE.pth"
    assert load_reward("aesthetic", CPU, weights={"aesthetic": str(head)}).embed_dim == 32


# --- what is refused

BROKEN = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a web page": lambda data: b"<!DOCTYPE html><html>not found</html>",
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_refused(tmp_path, suffix, broken):
    path = tmp_path / f"model{suffix}"
    weight = {"weight": torch.ones(64, 64), "bias": torch.ones(64)}
    save_file(weight, path) if suffix == ".safetensors" else torch.save(weight, path)
    assert load_weights(nn.Linear(64, 64), path, SOURCE).weight.sum() == 64 * 64
    path.write_bytes(BROKEN[broken](path.read_bytes()))
    with pytest.raises(ValueError, match=r"cannot be read as some.pt.*download it again"):
        load_weights(nn.Linear(64, 64), path, SOURCE)


class Surprise:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("surprise"),))


def test_a_file_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Surprise()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(nn.Linear(2, 2), tmp_path / "model.pt", SOURCE)
    assert not (tmp_path / "surprise").exists()


@pytest.mark.parametrize(
    ("there", "complaint"),
    [
        ({"weight": torch.ones(2, 2)}, "lacks 1 of 2 weights, the first is bias; expected some.pt"),
        ({"model.weight": torch.ones(2, 2)}, "lacks 2 of 2 weights"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, r"weight in .* is \(3, 2\), not \(2, 2\)"),
        ({}, "lacks 2 of 2 weights"),
        ([1, 2], "cannot be read"),
        ({"state_dict": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}}, "lacks 2 of 2 weights"),
    ],
)
def test_other_models_are_refused_before_they_are_used(tmp_path, there, complaint):
    torch.save(there, tmp_path / "model.pt")
    module = nn.Linear(2, 2)
    before = module.weight.clone()
    with pytest.raises(ValueError, match=complaint):
        load_weights(module, tmp_path / "model.pt", SOURCE)
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bias": torch.tensor([1.0, float("nan")])}, r"bias in .* contains NaN or infinity \(1 of 2 values\)"),
        ({"weight_scale": torch.ones(())}, "is quantised: .*; expected some.pt"),
        ({"weight.absmax": torch.ones(1)}, "is quantised: bitsandbytes in 4 bits"),
    ],
)
def test_weights_that_are_not_finite_or_quantised_are_refused(tmp_path, suffix, changes, complaint):
    path, found = tmp_path / f"model{suffix}", {"m.weight": torch.ones(2, 2), "m.bias": torch.ones(2)}
    found |= {f"m.{name}": value for name, value in changes.items()}
    save_file(found, path) if suffix == ".safetensors" else torch.save(found, path)
    with pytest.raises(ValueError, match=complaint):
        load_weights(nn.Linear(2, 2), path, SOURCE, key=lambda name: f"m.{name}")


def test_bytes_after_the_last_tensor_do_no_harm(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes() + bytes(16))
    assert load_weights(nn.Linear(2, 2), path, SOURCE).weight.sum() == 4


def test_a_checkpoint_without_its_entry_is_refused(tmp_path):
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"KeyError 'state_dict'"):
        load_weights(nn.Linear(2, 2), tmp_path / "model.pt", SOURCE, inside="state_dict")


def test_a_vocabulary_that_was_cut_off_is_refused(tmp_path, monkeypatch):
    use_small_architectures(monkeypatch)
    small = save_small_weights(tmp_path)
    words = tmp_path / "imagereward" / "vocab.txt"
    words.write_text(words.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds 29\d words, not BERT's 298; expected vocab.txt of"):
        load_reward("imagereward", CPU, weights=small)


def test_half_precision_files_are_loaded_in_the_precision_asked_for(tmp_path):
    """HPSv2's are published so. A temperature stays float32: in bf16 exp(4.6052) is 98.9, not 100."""
    torch.save({"weight": torch.ones(2, 2).half(), "bias": torch.ones(()).half() * 4.6052}, tmp_path / "model.pt")
    module = nn.Module()
    module.weight, module.bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(()))
    load_weights(module, tmp_path / "model.pt", SOURCE, torch.bfloat16)
    assert (module.weight.dtype, module.bias.dtype) == (torch.bfloat16, torch.float32)
    assert not module.weight.requires_grad and not module.training


# --- keys and shapes of the published files


def shapes(module: nn.Module, key=lambda name: name) -> dict[str, list[int]]:
    return {key(name): list(weight.shape) for name, weight in module.state_dict().items()}


def full_size() -> dict[str, dict[str, list[int]]]:
    """What the loader asks of each published file, at full size; nothing takes memory."""
    with torch.device("meta"):
        blip = imagereward.ImageGroundedText()
        open_clip, head = hpsv2.CLIP(**hpsv2.ARCHITECTURE), LinearHead(768)
    return {
        "aesthetic/aesthetic-model.pth": shapes(head),
        "aesthetic/model.safetensors": shapes(ClipImages(empty_clip(VIT_L_14))),
        "pickscore/model.safetensors": shapes(Clip(empty_clip(VIT_H_14))),
        "clipscore/model.safetensors": shapes(Clip(empty_clip(VIT_B_32))),
        "hpsv2/HPS_v2_compressed.pt": shapes(open_clip),
        "imagereward/ImageReward.pt": shapes(blip, imagereward.upstreams_name) | shapes(head, "mlp.{}".format),
    }


NOT_READ = {
    "aesthetic/model.safetensors": r"text_|logit_scale|.*position_ids",
    "pickscore/model.safetensors": r".*position_ids",
    "clipscore/model.safetensors": r".*position_ids",
    "imagereward/ImageReward.pt": r"blip\.(vision|text)_proj|.*position_ids",
}


def test_the_loader_asks_for_the_published_keys_and_shapes():
    for file, asked in full_size().items():
        there = REFERENCE.published(file)
        assert asked.items() <= there.items(), file
        left = {key for key in there.keys() - asked.keys() if not re.match(NOT_READ.get(file, "$"), key)}
        assert left == set(), file


@pytest.mark.parametrize(
    ("file", "config"), [("pickscore/model.safetensors", VIT_H_14), ("clipscore/model.safetensors", VIT_B_32)]
)
def test_what_is_written_down_is_transformers_clip(file, config):
    """An independent look at the list itself: the whole of the library's model, not the part we ask for."""
    with torch.device("meta"):
        model = CLIPModel(config)
    assert shapes(model) == {
        key: shape for key, shape in REFERENCE.published(file).items() if "position_ids" not in key
    }


def test_the_small_checkpoints_have_the_published_keys(tmp_path):
    """What parity is tested on has the same keys as what is published, but for how many layers there are."""
    for name in REFERENCE.REWARDS:
        for file, layout in golden(name)["files"].items():
            names = {"sac+logos+ava1-l14-linearMSE.pth": "aesthetic-model.pth"}
            there = REFERENCE.published(f"{name}/{names.get(file, file)}")
            first_layers = {key for key in there if not re.search(r"\.([2-9]|\d\d)\.(?!weight$|bias$)", key)}
            assert layout["shapes"].keys() == first_layers, (name, file)
