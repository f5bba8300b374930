"""Runs as the nodes and the routes see them: which one is meant, where it stands, what may be asked of it."""

import json
import threading
import time

import pytest
from fake_training import CPU, PLACE, FakeTraining, begin, runs_in, wanted

from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.nodes.runs import answers, resume
from comfy_tdpo.nodes.runs.marks import MARK, mark, mark_unheeded
from comfy_tdpo.nodes.runs.registry import finite, newest_grid
from comfy_tdpo.nodes.runs.reward_choice import RewardChoice
from comfy_tdpo.nodes.runs.select import choose, is_done, token
from comfy_tdpo.nodes.runs.start import Teller, job_under_way, prepare, start, wait_for
from comfy_tdpo.trainer.config import override
from comfy_tdpo.trainer.job import ENDED, Status
from comfy_tdpo.trainer.recommend.files import write_choice
from comfy_tdpo.trainer.run.loras import snapshots

KEYS = (
    "id node workflow state epoch epochs phase phase_done phase_total waits_for eta_s reward eval_rewards "
    "plan grid_shape samples_epoch grids kept strengths use lora error overoptimised message"
)


@pytest.fixture
def runs(tmp_path):
    return runs_in(tmp_path)


def chosen(runs, resume="continue", name="one", **asked):
    want = wanted(**asked)
    return choose(runs, name, resume, want.config(), want.prompts()).run.path.name


def finish(runs, name="one", **asked):
    assert begin(runs, name, **asked).wait(30).state == "finished"


def stop_after(runs, epochs, name="one", **asked):
    go = threading.Semaphore(epochs)
    job = begin(runs, name, go, **asked)
    job.subscribe(lambda event, status: job.stop() if status.epoch == epochs else None)
    assert job.wait(30).state == "stopped"


# --- which run is meant


def test_a_free_name_is_a_new_run(runs):
    assert [chosen(runs, resume) for resume in ("continue", "new")] == ["one", "one"]
    with pytest.raises(ValueError, match="got run_name 'one'; expected that of a run"):
        chosen(runs, "as it is")


def test_what_was_stopped_goes_on_or_makes_room(runs):
    stop_after(runs, 1)
    assert [chosen(runs, resume) for resume in ("continue", "as it is", "new")] == ["one", "one", "one-2"]


def test_what_is_finished_is_given_again_as_it_would_only_repeat_itself(runs):
    finish(runs)
    assert [chosen(runs, resume) for resume in ("continue", "as it is", "new")] == ["one", "one", "one"]
    assert is_done(runs.find("one"), wanted().config())
    assert not is_done(runs.find("one"), wanted(epochs=3).config())


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 7}, "seed was 42 and is 7"),
        ({"model": "comfyui:Test:2"}, "model was 'comfyui:Test:1' and is 'comfyui:Test:2'"),
        ({"text": "a blue circle"}, "its prompts were different"),
        ({"algorithm": "ddpo-100"}, "algorithm was 'ddpo-g' and is 'ddpo-100'"),
    ],
)
def test_other_settings_are_another_run(runs, change, difference):
    finish(runs)
    want = wanted(**change)
    choice = choose(runs, "one", "continue", want.config(), want.prompts())
    assert (choice.run.path.name, choice.because) == ("one-2", f"Run 'one' has other settings: {difference}.")
    assert chosen(runs, "new", **change) == "one-2"
    stop_after(runs, 1, "one-2", because=choice.because, **change)
    assert runs.status(runs.find("one-2"))["message"].startswith(f"{choice.because} Stopped after epoch 1")
    assert [chosen(runs, resume, **change) for resume in ("continue", "new")] == ["one-2", "one-3"]
    finish(runs, "one-2", **change)
    assert [chosen(runs, resume, **change) for resume in ("continue", "new")] == ["one-2", "one-2"]
    assert [chosen(runs, resume) for resume in ("continue", "new")] == ["one", "one-3"]
    assert runs.status(runs.find("one-2"))["message"].startswith("Load LoRA"), "it was not said when it was finished"


def test_a_run_that_never_trained_holds_nobody_to_its_settings(runs):
    go = threading.Semaphore(0)
    job = begin(runs, "one", go, seed=1)
    assert chosen(runs, "new", seed=1) == "one"
    job.stop()
    assert job.wait(30).state == "stopped"
    assert [chosen(runs, resume, seed=2) for resume in ("continue", "new")] == ["one", "one"]
    finish(runs, seed=2)
    assert runs.find("one").config.seed == 2


def test_more_epochs_go_on_and_fewer_are_enough(runs):
    finish(runs)
    finish(runs, epochs=4)
    assert [line["epoch"] for line in runs.find("one").metrics()] == [1, 2, 3, 4]
    assert is_done(runs.find("one"), wanted(epochs=3).config())


def test_settings_queued_during_a_training_are_named_until_it_takes_them(runs):
    job = begin(runs, go=threading.Semaphore(0))
    run, asked = runs.find("one"), wanted(epochs=3, settings="micro_batch = 2").config()
    mark_unheeded(run, resume.unheeded(run, asked))
    assert runs.status(run)["message"].endswith(
        "It was queued with other settings while it trained: epochs was 2 and is 3; micro_batch (in settings) was 24 "
        "and is 2. Queue the graph again when it has ended."
    )
    mark_unheeded(run, resume.unheeded(run, wanted().config()))
    assert "queued with other" not in runs.status(run)["message"], "the settings were set back"
    mark_unheeded(run, resume.unheeded(run, asked))
    job.stop()
    assert job.wait(30).state == "stopped"
    finish(runs, epochs=3, settings="micro_batch = 2")
    assert runs.status(run)["message"].startswith("Load LoRA")


def test_a_run_goes_on_with_files_that_have_moved(runs):
    def reward(folder):
        return RewardChoice({}).with_reward("hpsv2", 1.0, f"{folder}/HPS_v2_compressed.pt")

    finish(runs, reward=reward("/a"))
    assert chosen(runs, reward=reward("/b")) == "one"
    finish(runs, reward=reward("/b"), epochs=3)
    assert runs.find("one").config.reward_weights == {"hpsv2": "/b/HPS_v2_compressed.pt"}


@pytest.mark.parametrize("may_change", [None, lambda name: name in ("epochs", "micro_batch")], ids=["ours", "another"])
def test_what_may_change_is_said_in_one_place(runs, monkeypatch, may_change):
    """Which run is meant and what it goes on with both follow it."""
    if may_change:
        monkeypatch.setattr(resume, "may_change", may_change)
    finish(runs)
    kept = runs.find("one").config
    free, fixed = ("output.samples_every", "micro_batch")[:: -1 if may_change else 1]
    assert chosen(runs, settings=f"{fixed} = 2") == "one-2"
    assert chosen(runs, settings=f"{free} = 2") == "one"
    finish(runs, settings=f"{free} = 2", epochs=3)
    expected = override(kept, {"epochs": 3} | ({"micro_batch": 2} if may_change else {"output": {"samples_every": 2}}))
    assert runs.find("one").config == expected


def test_the_token_changes_with_what_a_node_would_give(runs):
    assert token(runs, "one", wait=True) == token(runs, "one", wait=False) == ""
    stop_after(runs, 1)
    stopped = token(runs, "one", wait=True)
    assert stopped.startswith("one stopped 1, ")
    finish(runs)
    assert token(runs, "one", wait=False) == "one finished 2"
    assert token(runs, "one", wait=True) == "", "a node that waited has given it all"
    stop_after(runs, 1, "one-2", seed=3)
    assert token(runs, "one", wait=True).startswith("one-2 stopped 1, "), "settings may be those of the second"


@pytest.mark.parametrize("wait", [True, False])
def test_queueing_again_resumes_a_run_that_ends_in_the_same_epoch_twice(runs, wait):
    """ComfyUI does not ask a node again whose token is that of its last execution."""
    stop_after(runs, 1)
    for how in ("continue", "new"):
        assert token(runs, "one", wait, how) != token(runs, "one", wait, how)
    assert token(runs, "one", wait, "as it is") == token(runs, "one", wait, "as it is") == "one stopped 1"
    finish(runs, "one-2", seed=3)
    assert token(runs, "one", wait) != token(runs, "one", wait), "the first may go on"
    assert token(runs, "one", wait, "new") == token(runs, "one", wait, "new"), "the second one is given again"


@pytest.mark.parametrize("wait", [True, False])
def test_a_stopped_run_with_other_widgets_does_not_run_the_node_again(runs, wait):
    """Else everything behind the node would run again too, at each queueing, for a run that the node does not mean."""
    stop_after(runs, 1)
    finish(runs, "one-2", seed=3)

    def asked(**changes):
        widgets = wanted(**changes).widgets | {"model": None, "prompts": None}  # None: it comes along a wire
        return token(runs, "one", wait, "continue", widgets)

    assert asked(seed=3) == asked(seed=3), "one-2 is finished"
    assert asked(epochs=1) == asked(epochs=1), "one has as many epochs"
    assert asked() != asked(), "one goes on"
    assert asked(seed=None) != asked(seed=None), "which one is not known yet"
    (runs.find("one").path / MARK).write_text('{"node": "1"}')
    assert asked(seed=3) != asked(seed=3), "an older version started it and kept no widgets"


# --- where it stands


def test_a_run_is_not_done_before_it_has_recommended(runs):
    finish(runs)
    run, asked = runs.find("one"), wanted(settings="output.recommend = true").config()
    assert is_done(run, wanted().config()) and not is_done(run, asked)
    write_choice(run.recommendation, {"newest_epoch": 1})
    assert not is_done(run, asked), "epoch 2 was trained later"
    write_choice(run.recommendation, {"newest_epoch": 2})
    assert is_done(run, asked)
    before = token(runs, "one", wait=True)
    run.recommended_lora.write_bytes(b"")
    assert token(runs, "one", wait=True) != before, "LoRA Apply must read the new file"


def test_a_status_has_what_the_browser_reads(runs):
    finish(runs, held_out=None)
    status = runs.status(runs.find("one"))
    assert set(status) == set(KEYS.split())
    expected = {
        "id": "one",
        "node": "7",
        "workflow": "a workflow",
        "state": "finished",
        "epoch": 2,
        "epochs": 2,
        "samples_epoch": 2,
        "error": None,
    }
    expected |= {
        "reward": "shapes-aesthetic",
        "eval_rewards": ["shapes-match"],
        "lora": "tdpo/one.safetensors",
        "eta_s": 0.0,
    }
    assert status.items() >= expected.items()
    assert runs.lora_name(runs.find("one")) == "tdpo/one.safetensors"
    assert (runs.loras / "tdpo" / "one.safetensors").read_bytes() == runs.find("one").latest_lora.read_bytes()
    assert (runs.find("one").path / "plots" / "reward.png").exists()
    runs.find("one").latest_lora.unlink()
    assert runs.lora_name(runs.find("one")) is None, "what lies there is not from this run"


def test_the_cost_is_said_before_the_first_epoch(runs):
    """With the preset's values where the node has 0."""
    go = threading.Semaphore(0)
    job = begin(runs, "one", go)
    message = runs.status(runs.find("one"))["message"]
    assert message == (
        "8 images of 10 steps in 2 epochs, at 64 px with guidance 3, for a LoRA of rank 16 with learning rate 0.0005. "
        "The curve starts when the first epoch ends."
    )
    job.stop()
    job.wait(30)


def test_load_lora_lists_the_recommended_lora_while_there_is_one(runs):
    finish(runs)
    run, shared = runs.find("one"), runs.loras / "tdpo" / "recommended" / "one.safetensors"
    assert not shared.exists()
    run.recommended_lora.write_bytes(b"weights")
    runs.share_loras(run)
    assert shared.read_bytes() == b"weights"
    run.recommended_lora.unlink()
    runs.share_loras(run)
    assert not shared.exists() and (runs.loras / "tdpo" / "one.safetensors").is_file()


RULE = 'stop_on_overoptimisation = {}\noveroptimisation.reward = "shapes-match"'


def overoptimise(runs, epochs, settings):
    """A run whose metrics say, from the second of `epochs` epochs on, that it overoptimises."""
    stop_after(runs, epochs, settings=settings, numbers={"epochs": 4, "samples_per_epoch": 4})
    run = runs.find("one")
    seen = {"overoptimisation/fall": 0.3, "overoptimisation/standard_errors": 4.0, "overoptimisation/since": 3}
    run.write_metrics([line | (seen if line["epoch"] > 1 else {}) for line in run.metrics()])
    return run


def test_a_run_that_overoptimises_says_what_to_use(runs):
    run = overoptimise(runs, 2, RULE.format("false"))
    runs = runs_in(runs.root.parent.parent)
    from comfy_tdpo.trainer import job

    job._jobs.clear()  # as after a restart
    status = runs.status(run)
    assert (status["state"], status["epoch"], status["overoptimised"]) == ("interrupted", 2, 3)
    assert status["eval_rewards"] == ["shapes-match"]
    assert status["message"].startswith(
        "Overoptimisation since epoch 3: the training reward rose while the held-out shapes-match fell. Use the "
        "snapshot of epoch 1, or a later one at a lower strength. Interrupted after epoch 2 of 4, saved. Queue"
    )


def test_a_run_that_ended_on_overoptimisation_is_finished_until_it_is_to_train_on(runs):
    from comfy_tdpo.trainer import job

    run = overoptimise(runs, 2, RULE.format("true"))
    job._jobs.clear()
    status = runs.status(run)
    assert (status["state"], status["epoch"], status["epochs"]) == ("finished", 2, 4)
    assert status["message"].endswith(
        "Ended after epoch 2 of 4, saved. "
        "To train on, set stop_on_overoptimisation (in settings) to false and queue the graph."
    )
    assert is_done(run, wanted(epochs=4, settings=RULE.format("true")).config())
    assert not is_done(run, wanted(epochs=4, settings=RULE.format("false")).config())
    finish(runs, settings=RULE.format("false"), epochs=4)
    assert len(run.metrics()) == 4


def test_the_states_of_a_run(runs):
    go = threading.Semaphore(1)
    job = begin(runs, go=go)
    run = runs.find("one")
    states = {runs.status(run)["state"]}
    while job.status.epoch < 1:
        states.add(runs.status(run)["state"])
    assert states <= {"waiting", "running"}
    assert runs.status(run)["phase_total"] in (0, 4)
    status = runs.stop(run)
    assert status["state"] in ("stopping", "stopped")
    job.wait(30)
    assert runs.status(run)["state"] == "stopped"
    assert "after epoch 1 of 2, saved. Queue the graph to resume" in runs.status(run)["message"]


def test_what_can_be_done_meanwhile_depends_on_who_waits(runs):
    go = threading.Semaphore(1)
    job = begin(runs, go=go)
    run = runs.find("one")
    while job.status.epoch < 1:
        job.wait(0.01)
    assert "Queue the graph to sample from the newest epoch. Stop when" in runs.status(run)["message"]
    mark(run, PLACE, True, "")
    assert "The graph goes on when it ends. Stop when" in runs.status(run)["message"]
    job.stop()
    assert job.wait(30).state == "stopped"


def test_a_run_that_nobody_holds_was_interrupted_and_remembers_its_node(runs):
    want = wanted()
    prepare(runs, runs.folder("left"), want.config(), want.prompts())
    status = runs.status(runs.find("left"))
    assert (status["state"], status["epoch"], status["epochs"], status["node"]) == ("interrupted", 0, 2, None)
    (runs.find("left").path / "comfyui.json").write_text("[1]", encoding="utf-8")
    assert runs.status(runs.find("left"))["node"] is None


def test_a_failed_run_says_why_without_the_machines_folders(runs, caplog):
    def fail(run, stop, watch):
        raise ValueError(f"checkpoint '{run.path}/checkpoints' and /home/me/x.bin are\nbad / see https://host/a/b")

    want, run = wanted(), runs.folder("one")
    prepare(runs, run, want.config(), want.prompts())
    job = start(runs, run, fail, CPU, PLACE, lambda detail: None)
    job.wait(30)
    status = runs.status(run)
    assert status["state"] == "failed"
    assert status["error"] == "checkpoint 'output/tdpo/one/checkpoints' and x.bin are bad / see https://host/a/b"
    with pytest.raises(RuntimeError, match="run 'one' failed: checkpoint"):
        wait_for(job, lambda done, total: None)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("'/tmp/w t/a.pth' lacks 2 of huggingface.co/x/y", "'a.pth' lacks 2 of huggingface.co/x/y"),
        ('"/home/bob/x y/f.pt" and C:\\Users\\bob\\f.pt; ratio 1/2 and/or', '"f.pt" and f.pt; ratio 1/2 and/or'),
        ("put it at '~/models/A/b.pt', or in /srv/x/", "put it at 'b.pt', or in "),
    ],
)
def test_folders_of_the_machine_are_left_out_and_nothing_else(runs, text, seen):
    assert runs.told(text) == seen


def test_files_that_somebody_else_put_into_a_run_are_left_alone(runs):
    finish(runs)
    run = runs.find("one")
    for copy, path in (("epoch-0002_best", newest_grid(run)), ("epoch-0002 copy", run.lora(2))):
        path.with_name(copy + path.suffix).write_bytes(path.read_bytes())
    assert runs.status(run)["samples_epoch"] == 2
    assert sorted(snapshots(run)) == [1, 2]


@pytest.mark.parametrize("content", [None, "[" * 100_000], ids=["a folder", "nested"])
def test_damaged_metrics_are_told_of_their_run(runs, content):
    finish(runs)
    path = runs.find("one").path / "metrics.jsonl"
    path.unlink()
    path.mkdir() if content is None else path.write_text(content + "\n")
    assert [status["id"] for status in runs.overview()["runs"]] == ["one"]
    code, told = answers.metrics(runs, "one", "0")
    assert code == 400 and "is damaged" in told["error"]


def test_a_damaged_folder_does_not_hide_the_others(runs):
    finish(runs)
    (runs.root / "bad").mkdir()
    (runs.root / "bad" / "config.toml").write_text("epochs = [", encoding="utf-8")
    listed = {status["id"]: status for status in runs.overview()["runs"]}
    assert set(listed) == {"one", "bad"}
    assert listed["bad"]["state"] == "failed" and set(listed["bad"]) == set(KEYS.split())
    assert str(runs.root.parent.parent) not in json.dumps(listed)


def test_runs_wait_in_a_row_and_say_for_whom(runs):
    told, go = [], threading.Semaphore(0)
    first, second = begin(runs, "one", go), begin(runs, "two", go)
    third = begin(runs, "three", tell=told.append)
    status = runs.status(runs.find("three"))
    assert (status["state"], status["waits_for"]) == ("waiting", "one")
    assert status["message"].startswith("Waits for run 'one' to end, then starts by itself.")
    first.stop()
    first.wait(30)
    end = time.monotonic() + 30
    while not any(detail["waits_for"] == "two" for detail in told):
        assert time.monotonic() < end, told
    second.stop()
    assert third.wait(30).state == "finished"
    assert runs.status(runs.find("three"))["waits_for"] is None


def test_a_run_that_is_stopping_is_waited_for(runs):
    job, run = begin(runs, go=threading.Semaphore(0)), runs.find("one")
    assert job_under_way(runs, run) is job
    job.stop()
    assert job_under_way(runs, run) is None
    assert job.status.state == "stopped"


# --- being told, and waiting


def test_epochs_and_the_end_are_always_told(runs):
    told = []
    job = begin(runs, tell=told.append, epochs=3)
    job.wait(30)
    assert all(set(detail) == {*KEYS.split(), "metrics"} for detail in told)
    epochs = [detail["metrics"]["epoch"] for detail in told if detail["metrics"]]
    assert sorted(set(epochs)) == [1, 2, 3]
    assert (told[-1]["state"], told[-1]["lora"]) == ("finished", "tdpo/one.safetensors")
    json.dumps(told, allow_nan=False)


def test_phases_are_told_now_and_then(runs, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    want = wanted()
    prepare(runs, runs.folder("one"), want.config(), want.prompts())
    told = []
    teller = Teller(runs, runs.folder("one"), lambda detail: told.append(clock[0]))
    for clock[0] in (1.0, 1.1, 1.19, 1.21, 1.3):
        teller("phase", Status("one", "running", 0, 2, "sampling"))
    teller("phase", Status("one", "running", 0, 2, "updating"))
    teller("epoch", Status("one", "running", 1, 2, "updating"))
    assert told == [1.0, 1.21, 1.3, 1.3]
    teller("phase", Status("one", "waiting", 1, 2, "updating", waits_for="two"))
    assert told[-1] == 1.3 and len(told) == 5


def test_what_is_told_last_is_the_newest(runs):
    """Threads of other runs tell of one that waits, and its own may tell of its end meanwhile."""
    want = wanted()
    prepare(runs, runs.folder("one"), want.config(), want.prompts())
    told = []

    def tell(detail):
        if threading.current_thread() is older:
            newer.start()
            newer.join(0.3)  # in vain: it waits
        told.append(threading.current_thread())

    teller = Teller(runs, runs.folder("one"), tell)
    older, newer = (threading.Thread(target=teller, args=("end", Status("one", state, 0, 2))) for state in ENDED[:2])
    older.start()
    older.join()
    newer.join()
    assert told == [older, newer]


def test_the_bar_of_the_graph_moves_within_an_epoch_and_never_goes_back(runs):
    """It is ComfyUI's own; what is drawn before and after the updates has no share in it."""
    progress = [("sampling", 1, 4), ("sampling", 1.5, 4), ("drawing for guards", 3.5, 8), ("updating", 0.25, 1)]
    progress += [("drawing samples", 0, 4)]
    seen = []

    class Halting(FakeTraining):
        def epochs(self):
            for phase in progress:
                self.watch(*phase)
                before = len(seen)
                while len(seen) < before + 2:  # the bar has looked at it
                    time.sleep(0.01)
            yield from super().epochs()

    want, run = wanted(), runs.folder("one")
    prepare(runs, run, want.config(), want.prompts())
    job = start(runs, run, Halting, CPU, PLACE, lambda detail: None)
    wait_for(job, lambda done, total: seen.append(done))
    assert sorted({done for done in seen if 0 < done <= 62}) == [12, 18, 62]
    assert seen == sorted(seen)


class Cancelled(Exception):
    pass


def test_a_cancelled_wait_stops_the_run_and_saves(runs):
    job = begin(runs, go=threading.Semaphore(1))

    def show(done, total):
        assert total == 200
        if done >= 100:
            raise Cancelled

    with pytest.raises(Cancelled):
        wait_for(job, show)
    assert job.status.state == "stopped"
    assert runs.status(runs.find("one"))["lora"] == "tdpo/one.safetensors"


# --- questions over HTTP


def test_answers(runs):
    finish(runs)
    assert answers.overview(runs)[1]["runs"][0] == answers.status(runs, "one")[1]
    status, answer = answers.metrics(runs, "one", "1")
    assert (status, answer["next"]) == (200, 2)
    assert [line["epoch"] for line in answer["metrics"]] == [2]
    assert answers.metrics(runs, "one", "2") == (200, {"metrics": [], "next": 2})
    for name in ("samples", "reward"):
        status, picture = answers.picture(runs, "one", name)
        assert status == 200 and picture.startswith(b"\x89PNG")
    assert newest_grid(runs.find("one")).name == "epoch-0002.png"
    assert answers.grid(runs, "one", "1") == (200, runs.find("one").sample_grid(1).read_bytes())
    assert answers.grid(runs, "one", "7")[0] == answers.at_strength(runs, "one", "1", "0.5")[0] == 404


@pytest.mark.parametrize("name", ["two", "../one", "..", "", "/etc/passwd", "C:\\x", "a\0b", "x" * 1000, ".hidden"])
def test_nothing_but_known_runs_is_answered_for(runs, name):
    finish(runs)
    (runs.root.parent / "config.toml").write_text("", encoding="utf-8")
    expected = 404 if name == "two" else 400
    asked = (
        answers.status,
        answers.stop,
        lambda *a: answers.metrics(*a, "0"),
        lambda *a: answers.picture(*a, "samples"),
        lambda *a: answers.grid(*a, "1"),
        lambda *a: answers.at_strength(*a, "1", "0.5"),
    )
    for ask in asked:
        status, answer = ask(runs, name)
        assert status == expected and set(answer) == {"error"} and "\n" not in answer["error"]
        assert str(runs.root) not in answer["error"] and len(answer["error"]) < 400


def test_wrong_questions_are_told_so(runs):
    finish(runs)
    assert answers.stop(runs, "one")[0] == 409
    assert answers.picture(runs, "one", "../config.toml")[0] == 400
    for after in ("-1", "x", "1.5", "", "9" * 400, "٣"):
        status, answer = answers.metrics(runs, "one", after)
        assert status == 400 and len(answer["error"]) < 200
        assert answers.grid(runs, "one", after)[0] == answers.at_strength(runs, "one", after, "1")[0] == 400
    for strength in ("-1", "nan", "inf", "1e3", "../1", "1.", "9" * 400):
        assert answers.at_strength(runs, "one", "1", strength)[0] == 400


def test_json_knows_no_nan():
    assert finite({"a": float("nan"), "b": float("inf"), "c": 1.5}) == {"a": None, "b": None, "c": 1.5}


# --- the table of runs, and deleting


def test_the_table_has_what_a_status_lacks(runs):
    finish(runs)
    finish(runs, "two", held_out=RewardChoice({"shapes-judge": 1.0}), settings='overoptimisation.reward = "none"')
    (runs.root / "bad").mkdir()
    (runs.root / "bad" / "config.toml").write_text("epochs = [", encoding="utf-8")
    (runs.find("one").path / "linked").symlink_to(runs.find("two").path, target_is_directory=True)
    rows = {row["id"]: row for row in answers.table(runs)[1]["rows"]}
    one, two, bad = (rows[name] for name in ("one", "two", "bad"))
    assert (one["algorithm"], one["watched"], two["watched"]) == ("ddpo-g", "shapes-match", "shapes-judge")
    key = "reward/shapes-aesthetic"
    assert one["metrics"] == [{"epoch": n, f"{key}/mean": n, f"{key}/std": 1.0} for n in (1, 2)]
    own = [path for path in runs.find("one").path.rglob("*") if path.is_file() and "linked" not in path.parts]
    assert one["files"] == len(own) and one["bytes"] == sum(path.stat().st_size for path in own)
    assert one["modified"] == (runs.find("one").path / "metrics.jsonl").stat().st_mtime
    assert (bad["algorithm"], bad["metrics"], bad["bytes"]) == ("", [], len("epochs = ["))


def test_a_run_is_deleted_and_another_may_take_its_name(runs, tmp_path):
    """What links in it point at stays, and so does the LoRA that Load LoRA lists."""
    finish(runs)
    finish(runs, "two")
    (tmp_path / "mine").mkdir()
    for target in (tmp_path / "mine" / "picture.png", tmp_path / "notes.txt"):
        target.write_text("mine")
    (runs.find("one").path / "samples" / "folder").symlink_to(tmp_path / "mine", target_is_directory=True)
    (runs.find("one").path / "notes.txt").symlink_to(tmp_path / "notes.txt")
    assert answers.delete(runs, "one") == (200, {"id": "one"})
    assert [path.name for path in runs.root.iterdir()] == ["two"]
    assert (tmp_path / "mine" / "picture.png").exists() and (tmp_path / "notes.txt").exists()
    assert (runs.loras / "tdpo" / "one.safetensors").is_file()
    assert answers.delete(runs, "one")[0] == answers.status(runs, "one")[0] == 404
    want = wanted()
    prepare(runs, runs.folder("one"), want.config(), want.prompts())
    assert runs.status(runs.find("one"))["epoch"] == 0, "that of the job before"


def test_a_run_that_trains_or_waits_is_not_deleted(runs):
    go = threading.Semaphore(0)
    job, waiting = begin(runs, "one", go), begin(runs, "two", go)
    while job.status.state != "running":
        job.wait(0.01)
    assert answers.delete(runs, "one") == (409, {"error": "run 'one' is training; stop it, then delete it"})
    assert answers.delete(runs, "two") == (409, {"error": "run 'two' waits for its turn; stop it, then delete it"})
    for stopped in (job, waiting):
        stopped.stop()
        stopped.wait(30)
    with runs.find("two").lock():
        code, told = answers.delete(runs_in(runs.root.parent.parent), "two")
    assert code == 400 and "run folder 'output/tdpo/two' is in use by another process" in told["error"]
    assert runs.exists("two") and answers.delete(runs, "two")[0] == 200


def test_what_a_run_still_writes_when_it_has_ended_is_deleted_too(runs):
    """Its plots are drawn after its state says that it is finished."""
    ended, drawn = threading.Event(), threading.Event()
    job = begin(runs, "one", threading.Semaphore(2))

    def write_late(event, status):
        if event == "end":
            ended.set()
            drawn.wait(30)
            write_atomically(job.run.path / "plots" / "late.png", lambda file: file.write_bytes(b"late"))

    job.subscribe(write_late)
    assert ended.wait(30)
    threading.Timer(0.2, drawn.set).start()
    assert answers.delete(runs, "one")[0] == 200
    assert list(runs.root.iterdir()) == []


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../tdpo/one", "/tmp", "one\x00", ".tdpo-deleted-1"])
def test_a_name_that_is_no_name_deletes_nothing(runs, name):
    finish(runs)
    assert answers.delete(runs, name)[0] == 400
    assert runs.exists("one") and runs.root.is_dir()


@pytest.mark.parametrize("missing", ["config.toml", "prompts.txt"])
def test_a_folder_that_is_no_run_is_not_deleted(runs, missing):
    finish(runs)
    (runs.find("one").path / missing).rename(runs.root / missing)
    code, told = answers.delete(runs, "one")
    assert code == (404 if missing == "config.toml" else 400) and (runs.root / "one" / "metrics.jsonl").is_file()
    if missing == "prompts.txt":
        assert told["error"] == "got folder 'one' without the prompts.txt that every run has; delete it yourself"
        (runs.root / "one" / missing).symlink_to(runs.root / missing)
        assert answers.delete(runs, "one")[0] == 400


def test_a_link_to_a_run_is_not_deleted(runs, tmp_path):
    finish(runs)
    elsewhere = (runs.root / "one").rename(tmp_path / "elsewhere")
    (runs.root / "one").symlink_to(elsewhere, target_is_directory=True)
    code, told = answers.delete(runs, "one")
    assert (code, told["error"]) == (400, "got run 'one', which is a link to another folder; delete the link yourself")
    assert (elsewhere / "metrics.jsonl").is_file() and (runs.root / "one").is_symlink()


def test_a_run_is_gone_at_once_and_what_remains_is_said_and_removed_later(runs, monkeypatch):
    from comfy_tdpo.nodes.runs import table

    finish(runs)
    finish(runs, "two")
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(table.shutil, "rmtree", lambda folder, **_: seen.append(runs.exists("one")))
        code, told = answers.delete(runs, "one")
    assert seen == [False] and code == 400
    assert "run 'one' is deleted, but files of it remain in output/tdpo/.tdpo-deleted-" in told["error"]
    assert [status["id"] for status in runs.overview()["runs"]] == ["two"]
    assert answers.delete(runs, "two")[0] == 200 and list(runs.root.iterdir()) == []
