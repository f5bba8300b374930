"""The process-wide switches: as a run needs them while it trains, and as they were after it, however it ends."""

import threading

import pytest
import torch
from toy import lora_of, new_run, same, timeless, toy_training

from comfy_tdpo import arithmetic
from comfy_tdpo.nodes.runs.wording import in_words_of_nodes

BACKENDS = torch.backends
LEGACY = {"matmul": BACKENDS.cuda.matmul, "cudnn": BACKENDS.cudnn}


def seen() -> dict[str, object]:
    """Everything that `switched` may change, as torch reports it; a set of names that torch cannot read is left out."""
    found = {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": BACKENDS.cudnn.benchmark,
        "deterministic": BACKENDS.cudnn.deterministic,
        "fp16": getattr(BACKENDS.cuda.matmul, "allow_fp16_accumulation", None),
        "fp16 reduced": BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "cuDNN's attention": getattr(BACKENDS.cuda, "cudnn_sdp_enabled", lambda: None)(),
    }
    for name, place in LEGACY.items():
        try:
            found[f"tf32 {name}"] = place.allow_tf32
        except RuntimeError:
            found[f"tf32 {name}"] = "by the newer names"
    return found


@pytest.fixture(autouse=True)
def as_before():
    before = seen()
    yield
    assert seen() == before, "a test has left a switch behind"


@pytest.fixture
def otherwise():
    """Everything that a run wants otherwise, as ComfyUI's --fast and --deterministic leave it."""
    before = [(place, "allow_tf32", place.allow_tf32) for place in LEGACY.values()]
    before += [(BACKENDS.cudnn, "benchmark", BACKENDS.cudnn.benchmark)]
    before += [(BACKENDS.cuda.matmul, "allow_fp16_accumulation", BACKENDS.cuda.matmul.allow_fp16_accumulation)]
    for place, name, _ in before:
        setattr(place, name, True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    for place, name, value in before:
        setattr(place, name, value)


@pytest.mark.parametrize("deterministic", [False, True])
def test_they_are_set_and_put_back(otherwise, deterministic):
    before = seen()
    with pytest.raises(KeyError), arithmetic.switched(deterministic):
        off = dict.fromkeys(
            ("benchmark", "fp16", "fp16 reduced", "cuDNN's attention", "tf32 matmul", "tf32 cudnn"), False
        )
        # what the user has switched on stays on
        assert seen() == before | off | {"deterministic": deterministic, "warn_only": not deterministic}
        raise KeyError
    assert seen() == before


@pytest.mark.parametrize("first_out", [0, 1])
def test_what_overlaps_is_put_back_by_the_last_one_out(otherwise, first_out):
    """As an evaluation beside a training, on threads of their own."""
    before, blocks = seen(), [arithmetic.switched(True), arithmetic.switched(False)]
    for block in blocks:
        block.__enter__()
    inside = seen()
    assert inside["algorithms"] and inside["deterministic"] and not inside["warn_only"]
    blocks[first_out].__exit__(None, None, None)
    left = {"deterministic": False, "warn_only": True} if first_out == 0 else {}
    assert seen() == inside | left
    blocks[1 - first_out].__exit__(None, None, None)
    assert seen() == before


@pytest.mark.skipif(not hasattr(BACKENDS.cudnn, "conv"), reason="torch before 2.9 has one set of names")
def test_tf32_is_off_too_where_it_was_switched_on_by_the_newer_names():
    places = [BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32"
        BACKENDS.cudnn.rnn.fp32_precision = "ieee"  # now the older name has no answer
        with arithmetic.switched(False):
            assert [place.fp32_precision for place in places] == ["ieee"] * 3
        assert [place.fp32_precision for place in places] == ["tf32", "tf32", "ieee"]
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def test_a_deterministic_run_is_the_same_and_leaves_no_switch_behind(tmp_path, make_policy):
    """Stopped in mid-epoch, resumed as deterministic, and compared with an uninterrupted run on the CPU."""
    plain = toy_training(new_run(tmp_path / "plain", epochs=1), make_policy)
    expected = timeless(list(plain.epochs()))
    run, stop, during = new_run(tmp_path / "run", epochs=1), threading.Event(), []

    def watch(phase, done, total):
        during.append(torch.are_deterministic_algorithms_enabled())
        if phase == "updating":
            stop.set()

    assert list(toy_training(run, make_policy, stop, watch).epochs()) == []
    run.write_config(run.config.model_copy(update={"deterministic": True}))  # it may change
    assert not any(during)
    stop.clear()
    training, during = toy_training(run, make_policy, watch=lambda *_: during.append(seen()["algorithms"])), []
    assert timeless(list(training.epochs())) == expected
    assert during and all(during)
    assert same(lora_of(training), lora_of(plain))


def test_cublas_is_told_before_cuda_starts(monkeypatch):
    monkeypatch.delenv(arithmetic.WORKSPACE, raising=False)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # tests may run with a torch for the CPU alone
    arithmetic.check(False, cuda)
    arithmetic.check(True, torch.device("cpu"))
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG not set .* expected :4096:8: start the") as caught:
        arithmetic.check(True, cuda)
    advice = "start ComfyUI with its option 'deterministic', or set deterministic (in settings) to false"
    assert in_words_of_nodes(str(caught.value)).endswith(advice)
    arithmetic.prepare(False)
    assert arithmetic.WORKSPACE not in arithmetic.os.environ
    arithmetic.prepare(True)
    arithmetic.check(True, cuda)
    monkeypatch.setenv(arithmetic.WORKSPACE, ":4096:2")  # the user's own wins, and is named
    arithmetic.prepare(True)
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG :4096:2 "):
        arithmetic.check(True, cuda)
