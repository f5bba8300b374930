"""What the terminal shows of a run, from metrics made up here, against figures worked out by hand."""

import io
import logging
import math

import pytest
import torch
from safetensors.torch import save_file

from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.metrics import duration
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.terminal.console import Console
from comfy_tdpo.trainer.terminal.summary import summary


@pytest.fixture(autouse=True)
def now(monkeypatch) -> list[float]:
    """The clock, which stands still unless a test sets it."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics_of(epoch: int, **changes: float) -> dict[str, float]:
    line = {"epoch": epoch, "reward_queries": 48 * epoch}
    line |= {"reward/shapes-aesthetic/mean": 6.31, "reward/shapes-aesthetic/std": 1.2}
    line |= {"eval/shapes-judge/mean": 0.61, "eval/shapes-gold/mean": 0.7242, "policy/ratio_drift": 2.1e-7}
    line |= {"critic/explained_variance": 0.31, "time/epoch_s": 4.2, "memory/peak_bytes": 3 * 2**29}
    return line | changes


def make_console(stream: io.StringIO, epochs: int = 40, first_epoch: int = 1, **overrides) -> Console:
    return Console(make_config(overrides={"epochs": epochs, **overrides}), first_epoch, stream)


def lines_of(*epochs: dict[str, float], **overrides) -> list[str]:
    stream = io.StringIO()
    console = make_console(stream, **overrides)
    for metrics in epochs:
        console.epoch(metrics)
    console.close()
    return stream.getvalue().splitlines()


def courses(
    training: list[float], judge: list[float] | None = None, gold: list[float] | None = None
) -> list[dict[str, float]]:
    """Epochs in which the rewards run as given; those not given stay as they are."""
    given = {"reward/shapes-aesthetic/mean": training, "eval/shapes-judge/mean": judge, "eval/shapes-gold/mean": gold}
    return [
        metrics_of(i + 1, **{key: values[i] for key, values in given.items() if values}) for i in range(len(training))
    ]


def make_summary(tmp_path, metrics: list[dict[str, float]], **settings) -> str:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir(exist_ok=True)
    run.write_config(make_config(overrides=settings))
    for line in metrics:
        run.append_metrics(line)
    return summary(run)


def cells(text: str, name: str) -> list[str]:
    """The numbers in the table's row of a reward."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"{name} (")]
    return row.split(")")[1].split()


# --- lines


def test_a_line_tells_the_epoch():
    assert lines_of(metrics_of(12)) == [
        "epoch 12/40  reward 6.31 ± 1.20  shapes-judge 0.610  shapes-gold 0.724  ratio drift 2e-7  critic EV 0.31  "
        "4.2 s  ETA 1:58"
    ]


def test_a_line_without_a_critic_or_held_out_rewards():
    metrics = {key: value for key, value in metrics_of(1).items() if not key.startswith(("critic/", "eval/"))}
    assert lines_of(metrics) == ["epoch 1/40  reward 6.31 ± 1.20  ratio drift 2e-7  4.2 s  ETA 2:44"]


def test_without_a_terminal_there_is_one_line_an_epoch_and_no_control_characters():
    stream = io.StringIO()
    console = make_console(stream)
    for epoch in range(1, 6):
        for done in range(0, 48, 24):
            console.watch("sampling", done, 48)
        console.epoch(metrics_of(epoch))
    console.close()
    text = stream.getvalue()
    assert [line.split()[1] for line in text.split("\n")[:-1]] == [f"{epoch}/40" for epoch in range(1, 6)]
    assert text.replace("\n", "").isprintable()


def test_the_eta_is_the_mean_of_the_last_five_epochs_times_those_left():
    seconds = [100, 10, 20, 30, 40, 50]
    lines = lines_of(*(metrics_of(i + 1, **{"time/epoch_s": s}) for i, s in enumerate(seconds)), epochs=10)
    etas = [line.split("ETA ")[1] for line in lines]
    expected = [9 * 100, 8 * 55, 7 * 130 / 3, 6 * 40, 5 * 40, 4 * 30]
    assert etas == [duration(seconds) for seconds in expected]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (124, "2:04"), (3600, "1:00:00"), (90_061, "25:01:01")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_it_writes_to_what_stderr_is_now(capsys):
    Console(make_config(overrides={"epochs": 40}), 1).epoch(metrics_of(1))
    assert capsys.readouterr().err.startswith("epoch 1/40  ")


# --- the warning


@pytest.mark.parametrize("drift", [3e-4, 1.1e-5, math.nan])
def test_drift_warns_once_and_says_what_to_change(drift):
    stream = lines_of(*(metrics_of(epoch, **{"policy/ratio_drift": drift}) for epoch in (1, 2)), precision="bf16")
    (warning,) = [line for line in stream if not line.startswith("epoch ")]
    assert warning.startswith("warning: ratio drift ") and "expected at most 1e-5" in warning
    advice = "Set precision to fp32 (now bf16), or try another micro_batch (now 24)"
    assert warning.endswith(f"{advice}.")
    *_, warning = lines_of(metrics_of(1, **{"policy/ratio_drift": drift}), precision="bf16", compile=True)
    assert warning.endswith(f"{advice}, or set compile to false.")


def test_drift_within_its_tolerance_is_no_warning():
    assert len(lines_of(metrics_of(1, **{"policy/ratio_drift": 1e-5}))) == 1


def test_a_method_without_a_ratio_has_epochs_to_report_too():
    metrics = {key: value for key, value in metrics_of(1).items() if key != "policy/ratio_drift"}
    (line,) = lines_of(metrics)
    assert line.startswith("epoch 1/40  reward 6.31 ± 1.20") and "drift" not in line


def test_what_is_logged_as_a_warning_is_told_in_one_line():
    stream, logger = io.StringIO(), logging.getLogger("comfy_tdpo.models.single_file")
    with make_console(stream):
        logger.info("no warning")
        logger.warning("%s\nis odd", "it")
    logger.warning("after its end")
    assert stream.getvalue() == "warning: it is odd\n"


# --- the bar


def test_a_terminal_shows_one_bar_with_phase_reward_and_eta(now):
    stream = Terminal()
    console = make_console(stream, first_epoch=2)
    console._bar.mininterval = 0  # every change is drawn
    console.watch("sampling", 24.9, 48)  # the next micro-batch is under way
    console.epoch(metrics_of(2))
    now[0] += 4
    console.watch("updating", 7, 20)
    console.close()
    drawn = [part.rstrip() for part in stream.getvalue().split("\r") if part.strip()]
    held_out = "shapes-judge 0.610  shapes-gold 0.724"
    assert drawn[0].startswith("epochs 1/40 |")
    assert drawn[1].endswith("| sampling 24/48")
    assert drawn[2].startswith("epochs 2/40 |") and drawn[2].endswith(f"6.31 ± 1.20  EV 0.31  ETA 2:40  {held_out}")
    assert drawn[3].endswith(f"| updating 7/20    reward 6.31 ± 1.20  EV 0.31  ETA 2:36  {held_out}")
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().endswith("\n")


def test_the_bar_is_throttled():
    stream = Terminal()
    console = make_console(stream)
    start = console._bar.last_print_t
    for done in range(1000):  # in half a second
        console._bar._time = lambda done=done: start + done / 2000
        console.watch("updating", done, 1000)
    drawn = stream.getvalue().count("\r")
    console.close()
    assert drawn == 1 + 4  # at once, and every tenth of a second


def test_a_terminal_gets_the_warning_on_a_line_of_its_own():
    stream = Terminal()
    console = make_console(stream)
    console.epoch(metrics_of(1, **{"policy/ratio_drift": 1e-3}))
    console.close()
    assert "\rwarning: ratio drift 1e-3" in stream.getvalue() and ".\n" in stream.getvalue()


def test_a_logged_warning_leaves_the_bar_whole():
    stream = Terminal()
    with make_console(stream):
        logging.getLogger("comfy_tdpo.trainer.training").warning("a prompt is too long")
    before, _, after = stream.getvalue().partition("\rwarning: a prompt is too long\n")
    assert before.startswith("\repochs 0/40 |") and after.startswith("\repochs 0/40 |")


# --- the summary


def test_the_table_is_what_one_works_out_by_hand(tmp_path):
    metrics = courses([5.0, 5.5, 6.2, 6.5, 6.8], judge=[0.6, 0.6, 0.5, 0.4, 0.3], gold=[0.5, 0.6, 0.7, 0.8, 0.9])
    text = make_summary(tmp_path, metrics)
    assert text.splitlines()[0].split("  ")[0] == "reward" and "mean of 3-5" in text.splitlines()[0]
    # mean(6.2, 6.5, 6.8) = 6.5; + 1.5 of a std of 1.2
    assert cells(text, "shapes-aesthetic") == ["5.00", "6.50", "+1.50", "+1.25"]
    assert cells(text, "shapes-judge") == ["0.600", "0.400", "-0.200", "-"]
    assert cells(text, "shapes-gold") == ["0.500", "0.800", "+0.300", "-"]
    facts = dict(line.split("  ", 1) for line in text.split("\n\n")[-1].splitlines() if not line.startswith(" "))
    facts = {label: value.strip() for label, value in facts.items()}
    assert facts["reward queries"] == "240"
    assert facts["total time"] == "0:21"  # 5 * 4.2 s
    assert facts["peak memory"] == "1.5 GiB"


@pytest.mark.parametrize(
    ("rewards", "heading", "row"),
    [
        ([5.0], "later", ["5.00", "-", "-", "-"]),
        ([5.0, 6.2], "epoch 2", ["5.00", "6.20", "+1.20", "+1.00"]),
        ([5.0, 6.0, 8.0], "mean of 2-3", ["5.00", "7.00", "+2.00", "+1.67"]),
    ],
)
def test_a_short_run_is_compared_with_what_there_is(tmp_path, rewards, heading, row):
    text = make_summary(tmp_path, courses(rewards))
    assert f"  {heading}  " in text.splitlines()[0]
    assert cells(text, "shapes-aesthetic") == row
    assert ("no change to report yet" in text) == (len(rewards) == 1)


UP, DOWN = [5.0 + 0.1 * i for i in range(10)], [0.6 - 0.02 * i for i in range(10)]
NOISE = [0.60, 0.62, 0.58, 0.61, 0.57, 0.62, 0.60, 0.59, 0.58, 0.59]  # ends 0.013 lower, less than it jumps about


@pytest.mark.parametrize(
    ("training", "judge", "expected"),
    [
        (UP, DOWN, True),
        (UP, NOISE, False),
        (UP, [0.6] * 10, False),
        (UP, [1 - value for value in DOWN], False),
        ([5.0] * 10, DOWN, False),
        (UP[::-1], DOWN, False),
        ([5.0], [0.6], False),
    ],
)
def test_it_says_that_the_training_reward_rose_while_a_held_out_one_fell(tmp_path, training, judge, expected):
    text = make_summary(tmp_path, courses(training, judge)).replace("\n", " ")
    assert ("shapes-aesthetic rose while the held-out shapes-judge fell" in text) == expected
    assert ("at the expense of the others" in text) == expected


def test_overoptimisation_names_every_reward_that_fell(tmp_path):
    text = make_summary(tmp_path, courses(UP, DOWN, DOWN)).replace("\n", " ")
    assert "the held-out shapes-judge and shapes-gold fell" in text


@pytest.mark.parametrize(
    ("training", "judge", "sentences"),
    [
        (UP, UP, "shapes-aesthetic rose by 0.80 in 10 epochs. The held-out shapes-judge rose, and none fell."),
        (UP, None, "No held-out reward rose or fell."),
        (UP[::-1], DOWN, "shapes-aesthetic fell by 0.80 in 10 epochs. The held-out shapes-judge fell."),
        ([5.0] * 10, None, "shapes-aesthetic did not change by more than the noise between epochs."),
    ],
)
def test_a_plain_sentence_says_what_happened(tmp_path, training, judge, sentences):
    assert sentences in make_summary(tmp_path, courses(training, judge)).replace("\n", " ")


@pytest.mark.parametrize(("kept", "named"), [([2, 5, 8], "epoch-0005"), ([8], None), ([], None)])
def test_it_names_the_last_lora_from_before_the_fall(tmp_path, kept, named):
    late = [0.6, 0.6, 0.601, 0.6, 0.6, 0.601, 0.55, 0.4, 0.3, 0.2]
    for epoch in kept:
        path = tmp_path / "run" / "lora" / f"epoch-{epoch:04d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    text = make_summary(tmp_path, courses(UP, late)).replace("\n", " ")
    assert "at the expense of the others" in text
    assert (f"such as lora/{named}.safetensors" in text) if named else ("such as" not in text)


@pytest.mark.parametrize(
    ("algorithm", "advice"),
    [
        (
            "tdpo-r",
            "Use an earlier snapshot of this run, train for fewer epochs, or add a KL penalty (--kl.coefficient).",
        ),
        ("alignprop", "Use an earlier snapshot of this run, or train for fewer epochs."),
    ],
)
def test_the_advice_is_what_the_algorithm_has(tmp_path, algorithm, advice):
    assert advice in make_summary(tmp_path, courses(UP, DOWN), algorithm=algorithm).replace("\n", " ")


def test_without_held_out_rewards_it_says_how_to_watch_one(tmp_path):
    metrics = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in courses(UP)]
    assert "add one with --eval-reward" in make_summary(tmp_path, metrics).replace("\n", " ")


def test_it_says_where_the_lora_is_and_how_to_use_it(tmp_path):
    lines = [line.split(maxsplit=1) for line in make_summary(tmp_path, courses(UP)).splitlines()]
    lora = str(tmp_path / "run" / "lora" / "latest.safetensors")
    assert ["LoRA", lora] in lines
    assert ["plots", str(tmp_path / "run" / "plots")] in lines
    (comfyui,) = [line for line in lines if line[:1] == ["in"] and line[1].startswith("ComfyUI")]
    assert "models/loras" in comfyui[1]
    assert [line for line in lines if line[-1:] and line[-1].endswith(f" pipe.load_lora_weights({lora!r})")]


def test_it_says_which_part_of_a_pipeline_a_whole_model_is(tmp_path):
    for metadata, part in (({"network": "transformer"}, "transformer"), ({"epoch": "1"}, "unet")):
        model = tmp_path / part / "run" / "model" / "latest.safetensors"
        model.parent.mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, model, metadata)
        assert f" pipe.{part}.load_state_dict(" in make_summary(tmp_path / part, courses(UP), policy={"train": "full"})


def test_it_is_at_most_100_columns_wide(tmp_path):
    long = " + ".join(["0.333333 shapes-aesthetic"] * 3)
    metrics = [
        {key.replace("shapes-aesthetic", long): value for key, value in line.items()} for line in courses(UP, DOWN)
    ]
    text = make_summary(tmp_path, metrics)
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 100
    assert "at the expense of the others" in text.replace("\n", " ")


def test_a_constant_reward_has_no_change_in_standard_deviations(tmp_path):
    metrics = [line | {"reward/shapes-aesthetic/std": 0.0} for line in courses([5.0, 5.0])]
    assert cells(make_summary(tmp_path, metrics), "shapes-aesthetic") == ["5.00", "5.00", "+0.00", "-"]


def test_a_run_without_an_epoch_says_so(tmp_path):
    assert make_summary(tmp_path, []) == f"No epoch has finished yet in {tmp_path / 'run'}."
