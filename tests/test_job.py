"""A real training on a background thread: watched, stopped, continued, failed."""

import gc
import threading
import weakref

import pytest
import torch
from toy import new_run, timeless, toy_training

from comfy_tdpo.trainer.job import Job, find_job, job_on, stop_all
from comfy_tdpo.trainer.run import RunFolder


@pytest.fixture
def make_job(tmp_path, make_policy):
    """A job on a toy run; jobs of one name share a run, as a resumed one does. None outlives its test."""

    def make(name: str = "run", **overrides) -> Job:
        path = tmp_path / name
        run = RunFolder.open(path) if path.exists() else new_run(path, **overrides)
        return Job(run, lambda run, stop, watch: toy_training(run, make_policy, stop, watch))

    yield make
    stop_all(timeout=60)


def test_a_job_trains_to_its_end_and_says_so(make_job):
    job, events = make_job(), []
    assert (job.status.state, job.status.epoch, job.status.lora) == ("waiting", 0, None)
    job.subscribe(lambda event, status: events.append((event, status.epoch, status.state)))
    early: list[float] = []
    job.subscribe(lambda event, status: early.append(status.eta_s) if status.eta_s and not status.epoch else None)
    job.start()
    status = job.wait(timeout=120)
    assert early and all(eta > 0 for eta in early), "an estimate before the first epoch ends"
    assert (status.state, status.epoch, status.epochs, status.error) == ("finished", 3, 3, None)
    assert status.metrics == job.run.metrics()[-1]
    assert status.lora == job.run.latest_lora and status.lora.exists()
    assert status.eta_s == 0
    assert [epoch for event, epoch, _ in events if event == "epoch"] == [1, 2, 3]
    assert events[-1] == ("end", 3, "finished")


def test_a_job_is_found_by_its_id_and_only_by_that(make_job):
    job = make_job("sought")
    assert find_job(job.id) is None
    job.start()
    assert find_job("sought") is job
    assert find_job("another") is None
    job.wait(120)


def test_a_stopped_job_continues_where_it_was(make_job, tmp_path, make_policy):
    reference = toy_training(new_run(tmp_path / "whole"), make_policy)
    list(reference.epochs())
    job = make_job()
    job.subscribe(lambda event, status: job.stop() if status.phase == "updating" and status.epoch == 1 else None)
    job.start()
    status = job.wait(120)
    assert status.state == "stopped"
    assert status.epoch == 1
    again = make_job()
    again.start()
    assert again.wait(120).state == "finished"
    assert timeless(again.run.metrics()) == timeless(reference.run.metrics())


def test_jobs_on_a_device_train_one_after_the_other(make_job):
    jobs, running, trained = [make_job(name) for name in ("first", "second", "third", "fourth")], threading.Event(), []
    for job in jobs:
        job.subscribe(lambda event, status: trained.append(status.id) if event == "epoch" else None)
    jobs[0].subscribe(lambda event, status: running.set() if status.phase == "sampling" else None)
    for job in jobs:
        job.start()
    assert running.wait(60)
    assert [(job.status.state, job.status.waits_for) for job in jobs[1:]] == [("waiting", "first")] * 3
    with pytest.raises(ValueError, match="another run named 'second' is training or waiting"):
        make_job("second").start()
    jobs[2].stop()
    assert jobs[2].wait(60).state == "stopped", "it need not wait for its turn"
    assert jobs[0].status.state in ("running", "finished")
    assert [job.wait(120).state for job in jobs] == ["finished", "finished", "stopped", "finished"]
    assert trained == ["first"] * 3 + ["second"] * 3 + ["fourth"] * 3
    assert job_on("cpu") is None


def test_a_process_that_ends_stops_those_that_wait_too(make_job):
    first, second, begun = make_job("first"), make_job("second"), threading.Event()
    first.subscribe(lambda event, status: begun.set() if status.phase == "sampling" else None)
    first.start()
    second.start()
    assert begun.wait(60)
    stop_all(timeout=60)
    assert (first.status.state, second.status.state) == ("stopped", "stopped")
    assert not second.run.metrics() and not second.run.latest_lora.exists()


def test_a_failure_is_one_sentence_and_frees_the_device(make_job, tmp_path, make_policy):
    def fail(run, stop, watch):
        raise ValueError("the reward\nfell over")

    job = Job(new_run(tmp_path / "failing"), fail)
    job.start()
    status = job.wait(60)
    assert (status.state, status.error) == ("failed", "the reward fell over")
    other = make_job("other")
    other.start()
    assert other.wait(120).state == "finished"


def test_a_job_starts_once_and_a_second_start_blocks_nobody(make_job):
    job = make_job()
    job.start()
    with pytest.raises(ValueError, match="was started before"):
        job.start()
    job.wait(120)
    with pytest.raises(ValueError, match="was started before"):
        job.start()
    other = make_job("other")
    other.start()
    assert other.wait(120).state == "finished"


def test_a_subscriber_that_raises_disturbs_nobody(make_job, caplog):
    job, events = make_job(), []

    def raising(event, status):
        raise RuntimeError("the display is gone")

    job.subscribe(raising)
    job.subscribe(lambda event, status: events.append(event))
    job.start()
    assert job.wait(120).state == "finished"
    assert events[-1] == "end" and events.count("epoch") == 3
    assert "the display is gone" in caplog.text


def test_a_device_without_a_number_is_the_first(tmp_path):
    run = new_run(tmp_path / "run")
    assert Job(run, lambda *_: None, "cuda").device == Job(run, lambda *_: None, "cuda:0").device


def test_an_ended_subscription_hears_nothing(make_job):
    job, events = make_job(), []
    end = job.subscribe(lambda event, status: events.append(event))
    end()
    job.start()
    job.wait(120)
    assert events == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.56 GB)"),
    ],
)
def test_out_of_memory_names_the_settings_that_help(error, tmp_path):
    def fail(run, stop, watch):
        raise error

    job = Job(new_run(tmp_path / "run"), fail)
    job.start()
    assert job.wait(60).error.startswith("out of memory: lower resolution, micro_batch or decode_batch, set policy.")


def test_an_ended_job_holds_nothing_that_its_factory_held(tmp_path, make_policy):
    class Weights:
        pass

    weights = Weights()
    gone = weakref.ref(weights)
    factory = lambda run, stop, watch, weights=weights: toy_training(run, make_policy, stop, watch)  # noqa: E731
    job = Job(new_run(tmp_path / "run", epochs=1), factory)
    del weights, factory
    job.start()
    assert job.wait(120).state == "finished"
    gc.collect()
    assert gone() is None and find_job(job.id) is job


def test_a_process_that_ends_stops_all_jobs_and_saves(make_job):
    job, begun = make_job("ending"), threading.Event()
    job.subscribe(lambda event, status: begun.set() if status.phase == "updating" else None)
    job.start()
    assert begun.wait(60)
    assert job_on("cpu") is job
    stop_all(timeout=60)
    assert job.status.state == "stopped" and job.run.latest_lora.exists()
    assert job_on("cpu") is None
    stop_all(timeout=0)
