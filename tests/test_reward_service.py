"""Rewards that another program computes: the same scores to the bit, and patience with servers that fail.

Servers are real ones on the loopback interface: that of `serve`, and faulty ones made here.
"""

import base64
import io
import json
import math
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import children
import numpy as np
import pytest
import standin
import torch
from PIL import Image
from toy import fast_training, lora_of, new_run, same, timeless

from comfy_tdpo.interrupts import heeding
from comfy_tdpo.nodes.runs.wording import in_words_of_nodes
from comfy_tdpo.rewards import RewardError, check_reward, has_encoder, load_reward, load_rewards, remote, score_images
from comfy_tdpo.rewards.remote import allow_addresses, asking
from comfy_tdpo.rewards.remote.asking import Patience
from comfy_tdpo.rewards.remote.judge import KEY
from comfy_tdpo.rewards.remote.protocol import LARGEST_BODY, answer, packed, unpacked
from comfy_tdpo.trainer.__main__ import main
from comfy_tdpo.trainer.config import make_config
from comfy_tdpo.trainer.job import ENDED, Job
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.serving import RewardServer

CPU = torch.device("cpu")
IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red circle", "two blue squares", "a cat"]
TRAINING = {"algorithm": "ddpo-2", "epochs": 2, "guidance": 1.0}


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    """As on the command line; every fault is over in a second."""
    monkeypatch.setattr(remote, "_allowed", None)
    monkeypatch.setattr(asking, "PATIENCE", Patience(timeout=0.5, pauses=(0.05, 0.1)))
    monkeypatch.setattr(asking, "TICK", 0.01)


@contextmanager
def served(name: str = "shapes-judge", port: int = 0) -> Iterator[str]:
    """The address of a server of `serve`, on a thread."""
    server = RewardServer("127.0.0.1", port, load_reward(name, CPU), CPU)
    worker = threading.Thread(target=server.work)
    worker.start()
    try:
        yield server.url
    finally:
        server.end()
        worker.join()


Fault = Callable[[BaseHTTPRequestHandler, bytes], None]


class Faulty:
    """A server that meets its requests with `faults`, one each, and scores all further ones with 0, 1, 2, ..."""

    def __init__(self, *faults: Fault):
        self.faults, self.bodies, self.headers = list(faults), [], []
        self.over = threading.Event()  # ends those that stall
        faulty = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                faulty.bodies.append(body)
                faulty.headers.append(dict(self.headers))
                (faulty.faults.pop(0) if faulty.faults else scores)(self, body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.over = self.over
        self.server.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Faulty":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def says(text: bytes, status: int = 200) -> Fault:
    def send(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(text)

    return send


def scores(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    says(answer(body, [float(i) for i in range(len(unpacked(body)[0]))]))(handler, body)


def right(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    """What `serve --reward shapes-aesthetic` answers."""
    found = score_images(load_reward("shapes-aesthetic", CPU), *unpacked(body))
    says(answer(body, found.tolist()))(handler, body)


def made_of(change: Callable[[dict], object]) -> Fault:
    """The right answer, changed."""

    def send(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        right = json.loads(answer(body, [0.0] * len(unpacked(body)[0])))
        says(json.dumps(change(right)).encode())(handler, body)

    return send


def stalls(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.server.over.wait(10)


def drips(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    """Each byte comes in time, and the answer never ends."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b" ")


def dies(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [')


def hangs_up(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def late(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.server.over.wait(0.8)  # the client has asked again by then
    made_of(lambda right: right | {"scores": [9.0] * len(right["scores"])})(handler, body)


FAULTS = {
    "stalls": (stalls, "no answer within 0.5 s"),
    "drips": (drips, "no answer within 0.5 s"),
    "late": (late, "no answer within 0.5 s"),
    "dies": (dies, "an answer that is no JSON object"),
    "hangs up": (hangs_up, "RemoteDisconnected"),
    "garbage": (says(b"<html>busy</html>"), "an answer that is no JSON object"),
    "deep": (says(b"[" * 100_000), "an answer that is no JSON object"),
    "huge": (says(b" " * (2**20 + 1)), "an answer of more than 1048576 bytes"),
    "wrong batch": (made_of(lambda right: right | {"batch": "0" * 64}), "an answer for another batch"),
    "no batch": (made_of(lambda right: {"scores": right["scores"]}), "an answer for another batch"),
    "too few": (made_of(lambda right: right | {"scores": [1.0]}), "1 score, but 3 expected"),
    "no list": (made_of(lambda right: right | {"scores": "321"}), "no list of scores, but 3 expected"),
    "not a number": (made_of(lambda right: right | {"scores": [math.nan, 0, 0]}), "a score that is no finite number"),
    "infinite": (made_of(lambda right: right | {"scores": [1e39, 0, 0]}), "a score that is no finite number"),
    "very long": (made_of(lambda right: right | {"scores": [10**400, 0, 0]}), "a score that is no finite number"),
    "a truth": (made_of(lambda right: right | {"scores": [True, 0, 0]}), "a score that is no finite number"),
    "out of order": (says(b'{"error": "GPU \\u001b[31mburns"}', 500), "status 500: GPU [31mburns"),
    "busy": (says(b"later", 429), "status 429: later"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_and_asked_again(fault, caplog):
    happens, told = FAULTS[fault]
    with Faulty(happens) as server:
        found = score_images(load_reward(server.url, CPU), IMAGES, PROMPTS)
        assert found.tolist() == [0, 1, 2]
        assert len(server.bodies) == 2 and server.bodies[0] == server.bodies[1]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"reward '{server.url}': ") and told in line
    assert line.endswith("; waiting 0.05 s to ask again (1 of 2)")


def test_after_the_last_attempt_there_is_a_sentence():
    with Faulty(*[FAULTS["wrong batch"][0]] * 3) as server:
        with pytest.raises(RewardError, match=r"gave no valid answer in 3 attempts .* another batch; expected scores"):
            score_images(load_reward(server.url, CPU), IMAGES, PROMPTS)
        assert len(server.bodies) == 3


def test_a_refusal_is_not_asked_again():
    with Faulty(says(b'{"error": {"message": "no such model"}}', 404)) as server:
        with pytest.raises(RewardError, match=r"refused what it was asked \(status 404: no such model\)$"):
            score_images(load_reward(server.url, CPU), IMAGES, PROMPTS)
        assert len(server.bodies) == 1


def test_a_server_that_comes_up_later_is_found(caplog, monkeypatch):
    monkeypatch.setattr(asking, "PATIENCE", Patience(pauses=(0.05, *[0.2] * 300)))  # however busy the machine is
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reward, found = load_reward(f"http://127.0.0.1:{port}", CPU), []
    asking_thread = threading.Thread(target=lambda: found.append(score_images(reward, IMAGES, PROMPTS)))
    asking_thread.start()
    while not caplog.records:
        time.sleep(0.01)
    with served(port=port):
        asking_thread.join()
    assert torch.equal(found[0], score_images(load_reward("shapes-judge", CPU), IMAGES, PROMPTS))
    assert "ConnectionRefusedError" in caplog.records[0].getMessage()


# --- the same scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_batch_arrives_as_it_was_sent(dtype):
    sent = IMAGES.to(dtype)[:, :, ::2]  # not contiguous
    images, prompts = unpacked(packed(sent, ["a „quoted“ prompt\n", "", "猫"]))
    assert images.dtype == dtype and torch.equal(images, sent)
    assert prompts == ["a „quoted“ prompt\n", "", "猫"]


@pytest.mark.parametrize("name", ["shapes-aesthetic", "shapes-judge", "shapes-gold"])
def test_scores_are_the_same_to_the_bit(name):
    prompts = ["a red circle", "two blue squares", "a green triangle"]
    expected = score_images(load_reward(name, CPU), IMAGES, prompts)
    with served(name) as url:
        assert torch.equal(score_images(load_reward(url, CPU), IMAGES, prompts), expected)


def test_it_is_a_term_of_a_sum():
    own = load_reward("shapes-judge", CPU).score(IMAGES, PROMPTS)
    with served() as url:
        total = load_rewards({"shapes-aesthetic": 1.0, url: 2.0}, CPU)
        both = score_images(total, IMAGES, PROMPTS)
    assert torch.equal(both, load_reward("shapes-aesthetic", CPU).score(IMAGES, PROMPTS) + 2 * own)
    assert total.embed_dim == 64 and not total.differentiable


def test_a_large_batch_goes_in_parts(monkeypatch):
    monkeypatch.setattr(sys.modules["comfy_tdpo.rewards.remote.service"], "LARGEST_BODY", 2**20 + 100_000)
    with Faulty() as server:  # two images of 49,152 bytes fit
        assert score_images(load_reward(server.url, CPU), IMAGES, PROMPTS).tolist() == [0, 1, 0]
        assert sorted(unpacked(body)[1] for body in server.bodies) == [PROMPTS[2:], PROMPTS[:2]]


# --- a run


def trained(folder, url: str, **settings):
    """A training of a few updates on the reward at `url`, or of that name, which evaluates and guards too."""
    run = new_run(folder, rewards={url: 1.0}, **TRAINING | settings)
    return fast_training(run, load_reward(url, CPU))


def values(run: RunFolder, name: str) -> list[dict[str, float]]:
    """Its metrics, the reward called the same whatever its name."""
    lines = [{key.replace(name, "REWARD"): value for key, value in line.items()} for line in timeless(run.metrics())]
    return [{key: value for key, value in line.items() if key != "diversity"} for line in lines]  # of the encoder


def test_a_run_that_lost_its_service_resumes_to_the_same_result(tmp_path):
    """The service fails in the second epoch, between two micro-batches; all that came before is kept."""
    whole = trained(tmp_path / "whole", "shapes-aesthetic")
    list(whole.epochs())
    with served("shapes-aesthetic") as url:
        training = trained(tmp_path / "run", url)
        port = int(url.rpartition(":")[2])
        epochs = training.epochs()
        next(epochs)
        sample, batches = training.method.sample, []

        def lose(*args):
            if len(batches) == 2:
                batches[1].trajectories()  # it has been asked, and is answered
                monkey.setattr(training.context.reward, "name", "http://127.0.0.1:9")  # nobody is there
            batches.append(sample(*args))
            return batches[-1]

        with pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(training.method, "sample", lose)
            with pytest.raises(RewardError, match="gave no valid answer in 3 attempts .*ConnectionRefusedError"):
                next(epochs)
    run = RunFolder.open(tmp_path / "run")
    assert sorted(path.name for path in run.checkpoints.iterdir())[-1] == "epoch-0001-samples-000004-updates-000000"
    with served("shapes-aesthetic", port):
        again = fast_training(run, load_reward(url, CPU))
        list(again.epochs())
    assert values(run, url) == values(whole.run, "shapes-aesthetic")
    assert same(lora_of(again), lora_of(whole))


def test_a_stop_is_heeded_while_it_waits(tmp_path, monkeypatch):
    """Both for an answer and for the next attempt; the run is saved and goes on to the same result."""
    monkeypatch.setattr(asking, "PATIENCE", Patience(timeout=60.0, pauses=(60.0,)))
    whole = trained(tmp_path / "whole", "shapes-aesthetic")
    list(whole.epochs())
    run = new_run(tmp_path / "run", **TRAINING)
    # the grey image that is sent first, then micro-batches
    waits = "waiting for reward '{}' (status 500: no reason given)"
    for fault, phase in ((stalls, "sampling"), (says(b"", 500), waits)):
        with Faulty(right, right, fault) as server:
            reward = load_reward(server.url, CPU)
            job = Job(run, lambda run, stop, watch, reward=reward: fast_training(run, reward, stop=stop, watch=watch))
            job.start()
            while server.faults:
                time.sleep(0.01)
            while job.status.phase != phase.format(server.url) and job.status.state not in ENDED:
                time.sleep(0.01)  # what it waits for is shown
            began = time.monotonic()
            job.stop()
            status = job.wait(20)
            assert status.state == "stopped" and time.monotonic() - began < 10
        assert any(run.checkpoints.iterdir())
    again = fast_training(run, load_reward("shapes-aesthetic", CPU))
    list(again.epochs())
    assert same(lora_of(again), lora_of(whole))


def test_the_next_images_are_drawn_while_it_scores(tmp_path, monkeypatch):
    """The service keeps its first answer back until they are; the results are those of the reward in one process."""
    monkeypatch.setattr(asking, "PATIENCE", Patience())
    whole = trained(tmp_path / "whole", "shapes-aesthetic", epochs=1)
    list(whole.epochs())
    begun, waited = threading.Event(), []

    def late(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        waited.append(begun.wait(20))
        right(handler, body)

    def watch(phase: str, done: float, total: int) -> None:
        if phase == "sampling" and done > 2:  # a call of the model for the second micro-batch has ended
            begun.set()

    with Faulty(right, late, *[right] * 9) as server:
        run = new_run(tmp_path / "run", rewards={server.url: 1.0}, **TRAINING | {"epochs": 1})
        training = fast_training(run, load_reward(server.url, CPU), watch=watch)
        list(training.epochs())
        assert waited == [True]
        assert values(run, server.url) == values(whole.run, "shapes-aesthetic")
    assert same(lora_of(training), lora_of(whole))


def test_what_a_check_raises_leaves_a_sum_as_it_was_raised():
    """A sum takes exceptions of its parts for failures."""

    class Cancelled(Exception):
        pass

    def cancel() -> None:
        raise Cancelled

    with Faulty(stalls) as server, pytest.raises(Cancelled), heeding(cancel):
        score_images(load_reward(server.url, CPU), IMAGES, PROMPTS)


def test_a_wrong_address_is_told_before_the_run_begins(tmp_path, capsys):
    quick = ["--run-dir", str(tmp_path / "run"), "--eval-reward", "none", "--overoptimisation.reward", "none"]
    assert main(["--reward", "http://127.0.0.1:9", "--algorithm", "ddpo-2", *quick]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "reward 'http://127.0.0.1:9' gave no valid answer: ConnectionRefusedError" in line
    assert line.endswith("start the service there, with `python -m comfy_tdpo.trainer serve`, or correct the address")
    assert not (tmp_path / "run").exists()


def test_the_first_prompt_is_tried():
    with served("shapes-gold") as url:
        reward = load_reward(url, CPU)
        reward.check_prompts(["a red circle"])
        with pytest.raises(ValueError, match="status 400: shapes-gold can only judge prompts of Shapes"):
            reward.check_prompts(["a photo of a cat"])


# --- names


@pytest.mark.parametrize(
    "name",
    [
        "http://",
        "http://:80",
        "http://host:99999",
        "http://[::1",
        "http://me:secret@host",
        "http://host/?key=secret",
        "http://host#model",
        "http://host/a b",
        "http://host/\n",
        "judge:http://host/v1",
        "judge:host/v1#model",
        "judge:http://host/v1#a,b",
    ],
)
def test_a_malformed_address_is_refused(name):
    with pytest.raises(ValueError, match="expected the address of a service"):
        check_reward(name)


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1:8765", "https://a-b.example/x/y_z", "http://[::1]:80/", "judge:http://h:1/v1#Q/W-7B"]
)
def test_an_address_is_a_reward_without_encoder(name):
    check_reward(name)
    assert not has_encoder(name)


def test_addresses_must_be_allowed(monkeypatch):
    monkeypatch.setattr(remote, "_allowed", frozenset())
    for act in (
        lambda: load_reward("http://10.0.0.1", CPU),
        lambda: make_config(overrides={"guards": "http://10.0.0.1"}),
    ):
        with pytest.raises(ValueError, match="which sends images to an address; expected that only on the command"):
            act()
    allow_addresses(["http://10.0.0.1"])
    check_reward("http://10.0.0.1")
    with pytest.raises(ValueError, match="which sends images"):
        check_reward("http://10.0.0.1:81")


@pytest.mark.parametrize("algorithm", ["alignprop", "draft", "refl"])
def test_algorithms_that_need_the_gradient_refuse_it(algorithm):
    with pytest.raises(ValueError, match=rf"got reward 'http://h', which has no gradient, for algorithm {algorithm}"):
        make_config(overrides={"rewards": {"http://h": 1.0}, "algorithm": algorithm})


def test_a_graph_may_choose_what_the_servers_owner_has_listed(monkeypatch, tmp_path):
    """And nothing else, neither in the node nor in the settings of a run."""
    standin.install(monkeypatch)
    sys.modules["folder_paths"].get_folder_paths = lambda kind: [str(tmp_path)]
    node = import_module("comfy_tdpo.nodes.reward_model").RewardModel
    (tmp_path / "services.txt").write_text("# ours\nhttp://10.0.0.1:8765\n\njudge:http://10.0.0.1/v1#m\n")
    choices = next(socket.options for socket in node.define_schema().inputs if socket.id == "reward")
    assert choices[-2:] == ["http://10.0.0.1:8765", "judge:http://10.0.0.1/v1#m"]
    (choice,) = node.execute("http://10.0.0.1:8765", 1.0).values
    assert choice.weights == {"http://10.0.0.1:8765": 1.0}
    with pytest.raises(ValueError, match="got reward 'http://10.0.0.2'; expected one of "):
        node.execute("http://10.0.0.2", 1.0)
    with pytest.raises(ValueError, match="which sends images") as caught:
        make_config(overrides={"guards": "http://10.0.0.2"})
    assert "by a line in models/tdpo_rewards/services.txt" in in_words_of_nodes(str(caught.value))
    (tmp_path / "services.txt").write_bytes(b"\xff\xfe\xfa")
    assert "http://10.0.0.1:8765" not in next(iter(node.define_schema().inputs)).options


# --- the server


def refusal(url: str, body: bytes, **headers: str) -> tuple[int, str]:
    with pytest.raises(HTTPError) as caught, urlopen(Request(url, body, headers), timeout=10):
        pass
    return caught.value.code, json.loads(caught.value.read())["error"]


def test_wrong_requests_are_refused_with_a_sentence():
    with served() as url:
        assert refusal(url, b"nonsense")[0] == 400
        assert refusal(url, packed(IMAGES, ["one"])) == (400, "got 1 prompt for 3 images; expected one for each")
        assert "expected float" in refusal(url, packed(IMAGES[0], PROMPTS))[1]
        assert "expected float" in refusal(url, packed(IMAGES.byte(), PROMPTS))[1]
        assert "not finite" in refusal(url, packed(IMAGES / 0, PROMPTS))[1]
        assert "no list of strings" in refusal(url, packed(IMAGES, [1, 2, 3]))[1]
        assert refusal(url, b"x", **{"Content-Length": str(LARGEST_BODY + 1)})[0] == 413
        assert refusal(url, b"x", **{"Content-Length": "-1"})[0] == 411
        with urlopen(url, timeout=10) as response:  # it lives
            assert json.load(response) == {"reward": "shapes-judge"}


def test_a_model_that_fails_is_told_and_the_server_goes_on():
    with served() as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_reward("shapes-judge", CPU), "score", lambda *_: 1 / 0)
        with pytest.raises(RewardError, match="status 500: reward 'shapes-judge' failed: ZeroDivisionError"):
            score_images(load_reward(url, CPU), IMAGES, PROMPTS)
        patch.undo()
        score_images(load_reward(url, CPU), IMAGES, PROMPTS)


def test_the_command_serves_until_ctrl_c(tmp_path, capsys, monkeypatch):
    """A process of its own, as users run it, asked by `score`."""
    monkeypatch.setattr(asking, "PATIENCE", Patience())
    command = [sys.executable, "-m", "comfy_tdpo.trainer", "serve", "--reward", "shapes-judge", "--port", "0"]
    with (tmp_path / "log").open("w") as log:
        process = children.start(command, stderr=log)
    try:
        while not (found := re.search(r"train with --reward (\S+);", (tmp_path / "log").read_text())):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        Image.fromarray((IMAGES[0] * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
        asked = [
            "score",
            "--reward",
            found[1],
            "--reward",
            "shapes-judge",
            "--prompt",
            "a cat",
            str(tmp_path / "a.png"),
        ]
        assert main(asked) == 0
        _, theirs, ours = capsys.readouterr().out.splitlines()[1].split("\t")
        assert theirs == ours
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert (tmp_path / "log").read_text().splitlines()[-1].startswith("comfy_tdpo: stopped; ")
    finally:
        children.end(process)


def test_a_port_in_use_is_told_in_one_line(capsys):
    with Faulty() as other:
        port = other.url.rpartition(":")[2]
        assert main(["serve", "--reward", "shapes-gold", "--port", port]) == 2
    assert f"--port {port}, where nothing can listen: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", ""], "got an empty address; expected one of this machine, such as 127.0.0.1"),
        (
            ["--reward-weights", "x"],
            "got --reward-weights 'x'; expected a reward with its file or folder: write NAME=PATH",
        ),
        (
            ["--reward-weights", "hpsv2=/x"],
            "got --reward-weights for hpsv2; expected a reward that is used here (shapes-",
        ),
        (["--reward", "http://127.0.0.1:9"], "which is a service itself; expected one that is computed here"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(capsys, options, message):
    try:
        status = main(["serve", "--reward", "shapes-gold", *options])
    except SystemExit as error:
        status = error.code
    (*_, line) = capsys.readouterr().err.splitlines()
    assert status == 2 and message in line


# --- a judge


def verdict(*tokens: tuple[str, float]) -> bytes:
    tops = [{"token": token, "logprob": math.log(p) if p else -9999.0} for token, p in tokens]
    return json.dumps({"choices": [{"logprobs": {"content": [{"top_logprobs": tops}]}}]}).encode()


def judge_of(server: Faulty):
    return load_reward(f"judge:{server.url}/v1#some/model-7B", CPU)


def test_a_judge_scores_by_the_probabilities_of_yes_and_no(monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    monkeypatch.setattr(asking, "AT_ONCE", 1)  # in order
    verdicts = [
        verdict(("Yes", 0.5), (" yes", 0.1), ("no", 0.2), ("maybe", 0.2)),
        verdict(("NO", 0.9), ("I", 0.1)),
        verdict(("▁Yes", 0.3), ("\nno", 0.0)),
    ]
    with Faulty(*map(says, verdicts)) as server:
        found = score_images(judge_of(server), IMAGES, PROMPTS)
    assert found.tolist() == pytest.approx([0.75, 0.0, 1.0], rel=1e-6)  # float32
    for image, prompt, body, headers in zip(IMAGES, PROMPTS, server.bodies, server.headers, strict=True):
        asked = json.loads(body)
        picture, text = asked["messages"][0]["content"]
        data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
        levels = np.asarray(Image.open(io.BytesIO(data)))
        assert np.array_equal(levels, (image * 255).round().byte().permute(1, 2, 0).numpy())
        assert prompt in text["text"] and "yes or no" in text["text"]
        assert (asked["model"], asked["max_tokens"], asked["logprobs"]) == ("some/model-7B", 1, True)
        assert headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (verdict(("I", 0.9)), "neither yes nor no is among"),
        (b'{"choices": []}', "an answer without choices"),
        (b'{"choices": [{"logprobs": null}]}', "an answer without choices"),
        (verdict(("yes", 0.5)).replace(b"-0.69", b"0.69"), "whose top_logprobs are no tokens"),
        (verdict(("yes", 0.5)).replace(b'"yes"', b"1"), "whose top_logprobs are no tokens"),
    ],
)
def test_only_the_images_without_a_verdict_are_asked_about_again(text, told, caplog):
    with Faulty(says(text), *[says(verdict(("yes", 0.5), ("no", 0.5)))] * 3) as server:
        assert score_images(judge_of(server), IMAGES, PROMPTS).tolist() == [0.5] * 3
        assert len(server.bodies) == 4
    assert told in caplog.text


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch):
    monkeypatch.setenv(KEY, "secret\nkey")
    with pytest.raises(ValueError, match="unusual characters") as caught:
        load_reward("judge:http://127.0.0.1:9/v1#m", CPU)
    assert "secret" not in str(caught.value)
