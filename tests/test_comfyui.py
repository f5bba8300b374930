"""The nodes in a real ComfyUI server: graphs that train, stop, go on, sample meanwhile, and fail in one sentence."""

import json
import re
import shutil
import subprocess
import sys

import comfyui
import pytest
from backends import NEWER, OLDEST, ROOT, Backend, ask, each
from comfyui import (
    Events,
    Server,
    apply_graph,
    evaluate_graph,
    loop_graph,
    sample_graph,
    train_graph,
    wait_until,
)
from safetensors.torch import load_file, save_file

NODES = [
    "RewardModel",
    "Taste",
    "TemporalCritic",
    "Train",
    "Evaluate",
    "NeuronInspector",
    "ApplyLoRA",
    "ScoreImages",
    "ShapesModel",
    "Prompts",
]

pytestmark = pytest.mark.skipif(bool(comfyui.MISSING), reason=comfyui.MISSING)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Backend -> its server, one for all tests, whose log tells of nothing that went wrong in our code unseen.

    Its layers look for a Cancel as they do in later versions, which is harder for us.
    """
    started: dict[Backend, Server] = {}

    def server(backend: Backend) -> Server:
        if backend not in started:
            started[backend] = Server(tmp_path_factory.mktemp("comfyui"), check=True, backend=backend)
        return started[backend]

    yield server
    for backend, server in started.items():
        server.end()
        assert complaints(server.log.read_text(), backend) == []


def complaints(log: str, backend: Backend) -> list[str]:
    """The lines of a log that warn; of the fork, which warns of much by itself, only those that name us."""
    words = "warning|warn:|deprecat" if backend is OLDEST else "tdpo.*(warning|deprecat)"
    found = [line for line in log.splitlines() if re.search(words, line, re.IGNORECASE)]
    return found + [line for line in log.splitlines() if re.search("IMPORT FAILED.*tdpo|a subscriber of run", line)]


@pytest.fixture
def server(servers, request):
    return servers(getattr(request, "param", OLDEST))


in_each = pytest.mark.parametrize("server", each(), indirect=True)
in_oldest = pytest.mark.parametrize("server", each(full=NEWER), indirect=True)
in_newer = pytest.mark.parametrize("server", each(full=OLDEST), indirect=True)
KINDS = {1: "plot", 2: "curves", 3: "pictures"}  # of what Evaluate draws


def folders(server: Server) -> set[str]:
    return {path.name for path in (server.base / "output" / "tdpo").glob("*")}


@in_each
def test_the_server_lists_the_nodes_and_every_input_says_what_it_is(server):
    listed = {name: node for name, node in server.get("/object_info").items() if name.startswith("TDPO")}
    assert set(listed) == {f"TDPO{name}" for name in NODES}
    for node in listed.values():
        assert node["description"] and node["category"] == "TDPO"
        sockets = [socket for kind in ("required", "optional") for socket in node["input"].get(kind, {}).values()]
        assert all(more["tooltip"] for _, more in sockets)
        assert len(node["output_tooltips"]) == len(node["output"]) and all(node["output_tooltips"])


@in_each
def test_train_and_sample_in_one_graph(server):
    inspect = {
        "inspect": {"class_type": "TDPONeuronInspector", "inputs": {"run": ["train", 0]}},
        "told": {"class_type": "PreviewAny", "inputs": {"source": ["inspect", 1]}},
        "drawn": {"class_type": "PreviewImage", "inputs": {"images": ["inspect", 0]}},
        "grid": {"class_type": "PreviewImage", "inputs": {"images": ["train", 2]}},
        "plot": {"class_type": "PreviewImage", "inputs": {"images": ["train", 3]}},
        "native": {"class_type": "LoraModelLoader", "inputs": {"model": ["shapes", 0], "lora": ["train", 1]}},
    }
    inspect["native"]["inputs"]["strength_model"] = 1.0
    graph = train_graph("whole") | apply_graph(run=["train", 0]) | sample_graph(["apply", 0]) | inspect
    events = Events(server)
    first = server.ended(server.queue(graph))
    assert "execution_success" in first["messages"], first
    assert first["outputs"]["train"] == {"tdpo_run": ["whole"]}
    assert first["outputs"]["info"]["text"] == ["run whole, after epoch 2, strength 1"]
    assert first["outputs"]["told"]["text"][0].startswith("whole: 1232 neurons in the critic")
    assert first["outputs"]["scored"]["text"][0].startswith("shapes-aesthetic: ")
    again = server.ended(server.queue(graph))
    if server.backend is OLDEST:  # the fork's history does not say which
        assert {"train", "apply", "sampler"} <= set(again["messages"]["execution_cached"]["nodes"])

    told = [
        m["data"] for m in events.until(lambda m: m["type"] == "tdpo.progress" and m["data"]["state"] == "finished")
    ]
    events.close()
    progress = [data for data in told if "reward" in data]
    assert [data["metrics"]["epoch"] for data in progress if data["metrics"]][-1] == 2
    assert {"node": "train", "lora": "tdpo/whole.safetensors"}.items() <= progress[-1].items()
    assert "tdpo/whole.safetensors" in server.loras()
    for picture in ("samples", "reward"):
        status, body = server.raw(f"/api/tdpo/runs/whole/pictures/{picture}")
        assert status == 200 and body.startswith(b"\x89PNG")


@in_oldest
def test_the_flow_network_of_shapes_trains_and_is_sampled_in_one_graph(server):
    """By its own preset; ComfyUI's Load LoRA draws with its file what LoRA Apply draws with the run."""
    graph = train_graph("flows", learning_rate=0.01)  # large enough to be seen in a score
    graph["shapes"]["inputs"] = {"network": "flow"}
    base = {name: graph[name] for name in ("shapes", "reward")}
    plain = server.run(base | sample_graph(["shapes", 0]))["scored"]["text"]
    graph |= apply_graph(run=["train", 0]) | sample_graph(["apply", 0])
    outputs = server.run(graph)
    assert outputs["info"]["text"] == ["run flows, after epoch 2, strength 1"]
    config = (server.base / "output" / "tdpo" / "flows" / "config.toml").read_text(encoding="utf-8")
    assert 'model = "comfyui:ShapesFlowConfig:' in config and 'reads = "clean"' in config
    loader = {"model": ["shapes", 0], "lora_name": "tdpo/flows.safetensors", "strength_model": 1.0}
    native = {"native": {"class_type": "LoraLoaderModelOnly", "inputs": loader}}
    tuned = server.run(base | native | sample_graph(["native", 0]))["scored"]["text"]
    assert tuned == outputs["scored"]["text"] != plain


def test_weights_in_prompts_reach_the_model_and_not_the_rewards(server):
    """The same images score the same, whatever the prompt's weights; the run learns by its words, and resumes."""
    text = "\ufeff# mine\r\na (red:1.3)\u00a0circle\r\n"
    graph = train_graph("weighed", prompts=text) | sample_graph(["shapes", 0])
    graph["reward"]["inputs"]["reward"] = "shapes-judge"
    plain = server.run(graph)["scored"]["text"]
    graph["score"]["inputs"]["prompt"] = "a ((red)) (circle:1.2)\u200b"
    assert server.run(graph)["scored"]["text"] == plain
    graph["text"]["inputs"]["text"] = "a (red:1.5) circle"
    assert server.run(graph)["scored"]["text"] != plain
    run = server.base / "output" / "tdpo" / "weighed"
    assert (run / "prompts.txt").read_text(encoding="utf-8") == "a red circle\n"
    assert json.loads((run / "comfyui-prompts.json").read_text()) == {"a red circle": "a (red:1.3) circle"}
    same, other = (train_graph("weighed", prompts=f"a (red:{weight}) circle", epochs=3) for weight in (1.3, 1.4))
    for again in (same, other):
        again["reward"]["inputs"]["reward"] = "shapes-judge"
    assert server.run(same) and server.status("weighed")["epoch"] == 3
    assert server.run(other)["train"] == {"tdpo_run": ["weighed-2"]}
    said = "Run 'weighed' has other settings: the weights in its prompts were different."
    assert server.status("weighed-2")["message"].startswith(said)


def test_a_run_recommends_a_lora_that_apply_takes(server):
    """Also a run that has finished before, which is not trained again."""
    told = server.run(train_graph("judged") | apply_graph(run=["train", 0], snapshot="recommended"))["info"]["text"]
    assert told == ["run judged, after epoch 2, strength 1 (none is recommended yet, so the latest)"]
    asked = train_graph(
        "judged", settings="output.grid_images = 2\noutput.recommend = true\noutput.recommend_images = 4"
    )
    server.run(asked)
    run = server.base / "output" / "tdpo" / "judged"
    found = json.loads((run / "recommendation" / "choice.json").read_text())
    assert found["newest_epoch"] == 2
    assert ("tdpo/recommended/judged.safetensors" in server.loras()) == (found["recommended"] is not None)
    assert server.status("judged")["state"] == "finished" and server.status("judged")["epoch"] == 2
    weights = load_file(run / "lora" / "latest.safetensors")
    save_file(weights, run / "lora" / "recommended.safetensors", {"epoch": "2", "strength": "0.5"})
    outputs = server.run(asked | apply_graph(run=["train", 0], snapshot="recommended", strength=0.8))
    assert outputs["info"]["text"] == ["run judged, after epoch 2, strength 0.4 (the recommended 0.5 times 0.8)"]


def test_a_run_is_evaluated_cancelled_and_evaluated_further(server):
    """In the same file, which a whole evaluation would have written; nothing is scored twice."""
    train = train_graph("rated", settings="output.grid_images = 2\noutput.samples_every = 1", learning_rate=0.01)
    shown = {kind: {"class_type": "PreviewImage", "inputs": {"images": ["evaluate", i]}} for i, kind in KINDS.items()}
    outputs = server.run(train | evaluate_graph() | shown)
    assert outputs["evaluate"] == {"tdpo_evaluation": ["rated"]} and set(KINDS.values()) <= set(outputs)
    title, _, *rows = outputs["told"]["text"][0].splitlines()
    assert title == "shapes-unseen: 8 prompts, 1 image each (3 steps, guidance 3, 64 px)"
    assert [row.split()[:3] for row in rows[:3]] == [["base", "-", "0"], ["tdpo-r", "1", "4"], ["tdpo-r", "2", "8"]]
    folder = server.base / "output" / "tdpo" / "rated" / "evaluation"
    whole = (folder / "evaluation.jsonl").read_bytes()
    assert whole.count(b"\n") == 3 * 2
    tables = server.get("/tdpo/runs/rated/evaluation")["tables"]
    assert [table["title"].split(":")[0] for table in tables] == ["shapes-unseen", "shapes-complex"]
    status, body = server.raw("/api/tdpo/runs/rated/pictures/evaluation")
    assert status == 200 and body.startswith(b"\x89PNG")

    shutil.move(folder, folder.with_name("whole"))
    many = train | evaluate_graph(images=16, prompts="a red circle")
    prompt = server.queue(many)
    wait_until(lambda: (folder / "evaluation.jsonl").exists(), "the first line")
    server.post("/interrupt")
    assert "execution_interrupted" in server.ended(prompt)["messages"]
    assert server.get("/queue")["queue_running"] == []
    kept = (folder / "evaluation.jsonl").read_bytes()
    assert 1 <= kept.count(b"\n") < 3
    server.run(many)
    assert (folder / "evaluation.jsonl").read_bytes().startswith(kept)
    (folder / "evaluation.jsonl").write_bytes(whole[: len(whole) // 2])
    server.run(train | evaluate_graph(images=1))
    assert (folder / "evaluation.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": "7"}, "run 'refused' has no snapshot of epoch 7; expected some of those it has ("),
        ({"prompt_set": "complex"}, "shapes-gold can only judge prompts of Shapes"),
        ({"prompt_set": "nothing"}, "got prompt_set 'nothing'; expected one of auto"),
        (
            {"model": ["apply", 0]},
            "expected the same, without the run's LoRA: connect the MODEL that TDPO-R Train takes",
        ),
    ],
)
def test_hostile_inputs_to_evaluate_are_one_sentence(server, changes, message):
    train = train_graph("refused", learning_rate=0.01) | apply_graph(run=["train", 0])
    error = server.error(train | evaluate_graph(**changes))
    assert message in error and "\n" not in error and len(error) < 500


@in_newer
def test_cancel_saves_and_queueing_again_goes_on(server):
    prompt = server.queue(train_graph("cancelled", epochs=500))
    server.until("cancelled", lambda status: status["epoch"] >= 1 and status["phase"] == "updating")
    server.post("/interrupt")
    assert "execution_interrupted" in server.ended(prompt)["messages"]
    status = server.status("cancelled")
    assert status["state"] == "stopped" and 1 <= status["epoch"] < 500
    assert server.run(apply_graph(lora_name=status["lora"]) | train_graph("cancelled", resume="as it is"))
    outputs = server.run(train_graph("cancelled", epochs=status["epoch"] + 1) | apply_graph(run=["train", 0]))
    assert outputs["info"]["text"] == [f"run cancelled, after epoch {status['epoch'] + 1}, strength 1"]


def cancel(server: Server, prompt: str) -> None:
    """As the frontend cancels a single job; before ComfyUI had a route for that, the one to interrupt took its id."""
    if server.raw(f"/api/jobs/{prompt}/cancel", "POST")[0] in (404, 405):
        server.post("/interrupt", {"prompt_id": prompt})


@in_oldest
def test_a_loop_makes_a_run_of_each_iteration_that_differs_and_can_be_cancelled(server):
    """Its copies of the node have ids that are no numbers and are not in the workflow."""
    body, seeds = train_graph("looped", epochs=1), [{"seed": seed} for seed in (1, 2, 1)]
    server.run(loop_graph(body, *seeds))
    assert folders(server) >= {"looped", "looped-2"} and "looped-3" not in folders(server)
    for run in ("looped", "looped-2"):
        assert {"state": "finished", "node": "train"}.items() <= server.status(run).items()
    prompt = server.queue(loop_graph(body, {"epochs": 500}, {"seed": 3}))
    server.until("looped", lambda status: status["state"] == "running" and status["phase"])
    cancel(server, "0" * 8 + prompt[8:])
    assert server.status("looped")["state"] == "running", "that was another job"
    cancel(server, prompt)
    assert "execution_interrupted" in server.ended(prompt)["messages"]
    assert server.status("looped")["state"] == "stopped" and "looped-3" not in folders(server)
    server.run(loop_graph(train_graph("in-turn", mode="background"), {"seed": 1}, {"seed": 2}))
    for run in ("in-turn", "in-turn-2"):
        assert server.until(run, lambda status: status["state"] == "finished")["epoch"] == 2


def test_settings_queued_during_a_training_are_told_and_taken_by_a_graph_that_waits(server):
    server.run(train_graph("amended", epochs=10, mode="background"))
    server.run(train_graph("amended", epochs=11, mode="background"))
    told = "It was queued with other settings while it trained: epochs was 10 and is 11. Queue the graph again"
    status = server.status("amended")
    assert (status["epochs"], told in status["message"]) == (10, True), status
    assert server.run(train_graph("amended", epochs=11))["train"] == {"tdpo_run": ["amended"]}
    status = server.status("amended")
    assert (status["state"], status["epoch"]) == ("finished", 11) and status["message"].startswith("Load LoRA")


def test_a_finished_run_is_given_from_the_cache_although_another_of_its_name_was_stopped(server):
    prompt = server.queue(train_graph("beside", epochs=500))
    server.until("beside", lambda status: status["epoch"] >= 1)
    server.post("/interrupt")
    assert "execution_interrupted" in server.ended(prompt)["messages"]
    other = train_graph("beside", seed=5)
    assert server.run(other)["train"] == {"tdpo_run": ["beside-2"]}
    assert "train" in server.ended(server.queue(other))["messages"]["execution_cached"]["nodes"]


def test_a_run_that_was_cancelled_in_its_first_images_goes_on(server):
    """Or takes other settings, as nothing was trained by these."""
    prompt = server.queue(train_graph("early", samples_per_epoch=64, steps=20))
    server.until("early", lambda status: status["phase"] == "sampling")
    server.post("/interrupt")
    assert "execution_interrupted" in server.ended(prompt)["messages"]
    status = server.status("early")
    assert (status["state"], status["epoch"]) == ("stopped", 0) and "saved" not in status["message"]
    server.run(train_graph("early"))
    assert server.status("early")["state"] == "finished"


def test_votes_on_the_samples_of_a_run_become_a_reward(server):
    server.run(train_graph("voted"))
    for col, liked in enumerate((True, False)):
        place = {"run": "voted", "epoch": server.status("voted")["samples_epoch"], "row": 0, "col": col}
        status, told = server.post("/tdpo/tastes/mine/votes", {"picture": place, "liked": liked})
        assert (status, told["votes"]) == (200, col + 1)
    assert server.get("/tdpo/tastes/mine") == told
    status, answer = server.post("/tdpo/tastes/mine/votes", {"picture": place | {"row": 9}, "liked": True})
    assert status == 400 and "expected rows 0 to 0" in answer["error"]
    assert server.raw("/tdpo/tastes/nobody")[0] == 404
    graph = train_graph("on-taste") | {"reward": {"class_type": "TDPOTaste", "inputs": {"name": "mine", "weight": 1.0}}}
    server.run(graph)
    assert server.status("on-taste")["reward"] == "taste:mine"
    assert "it has no guard" in server.status("on-taste")["message"], "tdpo-r has none"
    assert "expected a name of 1 to 80" in server.error(
        graph | {"reward": {"class_type": "TDPOTaste", "inputs": {"name": "../x", "weight": 1.0}}}
    )


@in_newer
def test_a_background_run_trains_while_other_graphs_sample(server):
    graph = train_graph("behind", epochs=500, mode="background") | apply_graph(run=["train", 0])
    assert server.run(graph)["info"]["text"] == ["run behind: no LoRA yet; the model is unchanged"]
    server.until("behind", lambda status: status["epoch"] >= 1)
    sampled = server.run(graph | sample_graph(["apply", 0]))
    assert re.fullmatch(r"run behind, after epoch \d+, strength 1", sampled["info"]["text"][0])
    before = server.until("behind", lambda status: status["epoch"] >= 2)
    assert before["state"] == "running"
    long = graph | sample_graph(["apply", 0])
    long["sampler"]["inputs"]["steps"] = 1000
    assert "execution_interrupted" in server.interrupted(server.queue(long))["messages"]
    assert server.status("behind")["state"] == "running", "the training took it"
    for name in ("next", "last"):
        server.run(train_graph(name, mode="background"))
        waiting = server.status(name)
        assert (waiting["state"], waiting["waits_for"]) == ("waiting", "behind")
    assert server.post("/tdpo/runs/behind/stop")[1]["state"] in ("stopping", "stopped")
    for name in ("next", "last"):
        assert server.until(name, lambda status: status["state"] == "finished")["epoch"] == 2
    server.until("behind", lambda status: status["state"] == "stopped")
    status, answer = server.post("/tdpo/runs/behind/stop")
    assert (status, set(answer)) == (409, {"error"})


def test_quitting_in_mid_run_saves_it(server, tmp_path):
    """Its folder then goes on in another ComfyUI."""
    with Server(tmp_path) as other:
        other.run(train_graph("quit", mode="background", epochs=500, samples_per_epoch=8, steps=8))
        other.until("quit", lambda status: status["phase"] == "updating")
        assert other.end() == 0, other.log.read_text()
    run = tmp_path / "output" / "tdpo" / "quit"
    (checkpoint,) = (run / "checkpoints").glob("epoch-0000-samples-*")
    assert (checkpoint / "state.json").is_file() and (run / "lora" / "latest.safetensors").is_file()
    shutil.copytree(run, server.base / "output" / "tdpo" / "quit")
    assert server.status("quit")["state"] == "interrupted"
    same = {"samples_per_epoch": 8, "steps": 8, "epochs": 1}
    assert server.run(train_graph("quit", **same))["train"] == {"tdpo_run": ["quit"]}
    assert server.status("quit")["state"] == "finished"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_name": "../../x"}, "got run name '../../x'; expected a name"),
        ({"run_name": "/tmp/x"}, "got run name '/tmp/x'; expected a name"),
        ({"run_name": "x" * 1000}, "of 1000 characters; expected a name"),
        ({"run_name": ""}, "got run name ''; expected a name"),
        ({"samples_per_epoch": 1}, "samples_per_epoch is 1; at least 2 are needed"),
        ({"resolution": 20}, "got resolution 20; expected a positive multiple of 8"),
        ({"settings": "prompts = 'x'"}, "got 'prompts' among the settings; the node has an input"),
        ({"settings": "micro_batch 4"}, "got settings that are not TOML"),
        (
            {"settings": "xyzzy = 1"},
            "settings: unknown setting 'xyzzy'; the config.toml of any run in output/tdpo lists them all",
        ),
        ({"prompt_set": "/etc/hostname"}, "got prompt_set '/etc/hostname'; expected one of auto"),
        ({"prompts": "a {red|blue} circle"}, "the text of prompts has alternatives of dynamic prompts in line 1"),
        ({"settings": "output.trackers = ['abacus']"}, "got tracker 'abacus'"),
        ({"settings": "policy.warmup_updates = 99"}, "policy.warmup_updates 99 (in settings) for a run of 12 updates"),
        ({"mode": "later"}, "got mode 'later'; expected one of wait, background"),
        ({"resume": 5}, "got resume '5'; expected one of continue, new"),
        ({"run_name": "nobody", "resume": "as it is"}, "got run_name 'nobody'; expected that of a run in output/tdpo"),
        ({"reward": ["shapes", 0]}, "reward, received_type(MODEL) mismatch input_type(TDPO_REWARD)"),
    ],
)
def test_hostile_inputs_to_train_are_one_sentence(server, changes, message):
    before = folders(server)
    graph = train_graph("hostile", **changes)
    error = server.error(graph)
    assert message in error and "\n" not in error and len(error) < 500
    assert folders(server) == before


@pytest.mark.parametrize("reward", ["jpeg-compressibility", "shapes-gold"])
def test_every_reward_trains_with_the_default_algorithm(server, reward):
    """Also those without an image encoder for the critic."""
    graph = train_graph(f"by-{reward}", algorithm="tdpo-g", epochs=1)
    graph["reward"]["inputs"]["reward"] = reward
    server.run(graph)
    assert server.status(f"by-{reward}")["state"] == "finished"
    told = f"reward '{reward}' has no image encoder, so the critic uses that of 'shapes-alignment'"
    assert told in server.log.read_text()


@pytest.mark.parametrize("algorithm", ["alignprop", "draft", "refl"])
def test_a_direct_gradient_trains_through_comfyuis_own_decoder(server, algorithm):
    name = f"direct-{algorithm}"
    more = "output.grid_images = 2\nrecompute.decoder = true\nrecompute.reward = true"
    server.run(train_graph(name, algorithm=algorithm, epochs=1, settings=more))
    assert server.status(name)["state"] == "finished"
    graph = train_graph("direct-jpeg", algorithm=algorithm, epochs=1)
    graph["reward"]["inputs"]["reward"] = "jpeg-compressibility"
    assert "'jpeg-compressibility', which has no gradient" in server.error(graph)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04\x95\x10\x00\x00\x00.", "which cannot be read"),
        (b"\x40\x00\x00\x00\x00\x00\x00\x00{}", "which cannot be read"),
        (None, "of which nothing fits this MODEL"),
    ],
    ids=["a pickle", "truncated", "of another model"],
)
def test_files_that_are_no_lora_for_this_are_one_sentence(server, content, message):
    path = server.base / "models" / "loras" / "bad.safetensors"
    if content is None:
        import torch
        from safetensors.torch import save_file

        save_file({"lora_te_text_model_x.lora_down.weight": torch.zeros(1, 1)}, path)
    else:
        path.write_bytes(content)
    error = server.error(train_graph("whole", resume="as it is") | apply_graph(lora_name="bad.safetensors"))
    assert message in error and "\n" not in error


def test_a_lora_from_the_train_node_is_the_same_whoever_applies_it(server):
    """LoRA Apply, ComfyUI's own loader, and diffusers."""
    server.run(train_graph("applied", learning_rate=0.01))
    found = ask("lora", str(server.base / "models" / "loras" / "tdpo" / "applied.safetensors"))
    # float32 through some twenty layers; the LoRA is added to the weights here and to the activations there
    assert found["Apply"] <= 1e-5 and found["diffusers"] <= 1e-5
    assert found["what it changes"] > 0.01


def test_weights_of_rewards_are_chosen_from_their_folder(server):
    """And checked: one that is cut short, one that is for nothing, one from outside."""
    folder = server.base / "models" / "tdpo_rewards"
    for place, content in (("PickScore_v1/model.safetensors", b"\x40\x00\x00"), ("notes.txt", b"no weights")):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)
    listed = server.get("/object_info/TDPORewardModel")["TDPORewardModel"]["input"]["optional"]["weights"][1]["options"]
    assert listed == ["auto", "PickScore_v1/model.safetensors"]
    for reward, weights, message in (
        ("pickscore", "auto", "PickScore_v1/model.safetensors' (3 bytes) cannot be read as model.safetensors of"),
        ("pickscore", listed[1], "PickScore_v1/model.safetensors' (3 bytes) cannot be read as model.safetensors of"),
        ("jpeg-compressibility", listed[1], "as the weights of reward 'jpeg-compressibility', which has none"),
        ("pickscore", "../../x.pt", "got weights '../../x.pt', which are not in models/tdpo_rewards; put them there"),
    ):
        graph = train_graph("weights", algorithm="ddpo-2")
        graph["reward"]["inputs"] |= {"reward": reward, "weights": weights}
        error = server.error(graph)
        assert message in error and "\n" not in error, error


def test_a_run_is_listed_compared_and_deleted(server):
    """Its LoRA stays for Load LoRA, and another run may take its name."""
    server.run(train_graph("unwanted"))
    (row,) = (row for row in server.get("/tdpo/table")["rows"] if row["id"] == "unwanted")
    run = server.base / "output" / "tdpo" / "unwanted"
    assert row["algorithm"] == "tdpo-r" and row["watched"] == "shapes-alignment"
    assert row["files"] == sum(path.is_file() for path in run.rglob("*")) and row["bytes"] > 100_000
    assert [line["epoch"] for line in row["metrics"]] == [1, 2]
    assert {"reward/shapes-aesthetic/std", "eval/shapes-alignment/mean"} <= set(row["metrics"][0])
    server.run(train_graph("busy", epochs=500, mode="background"))
    status, body = server.raw("/api/tdpo/runs/busy", "DELETE")
    assert status == 409 and json.loads(body)["error"].endswith("stop it, then delete it")
    assert server.raw("/api/tdpo/runs/unwanted", "DELETE") == (200, b'{"id": "unwanted"}')
    assert not run.exists() and not list(run.parent.glob(".*"))
    assert server.raw("/tdpo/runs/unwanted")[0] == 404 and "tdpo/unwanted.safetensors" in server.loras()
    server.post("/tdpo/runs/busy/stop")
    server.until("busy", lambda status: status["state"] == "stopped")
    assert server.raw("/tdpo/runs/busy", "DELETE")[0] == 200
    assert server.run(train_graph("unwanted", epochs=1))["train"] == {"tdpo_run": ["unwanted"]}
    assert server.status("unwanted")["epoch"] == 1


@pytest.mark.parametrize("name", ["nobody", "..%2f..%2fx", "%2e%2e", "C:%5cx", "a%00b", "x" * 1000])
def test_routes_know_nothing_but_runs(server, name):
    for path in (f"/tdpo/runs/{name}", f"/tdpo/runs/{name}/metrics", f"/tdpo/runs/{name}/pictures/samples"):
        status, body = server.raw(path)
        assert status in (400, 404) and str(server.base).encode() not in body
    before = folders(server)
    status, body = server.raw(f"/tdpo/runs/{name}", "DELETE")
    assert status in (400, 404) and str(server.base).encode() not in body and folders(server) == before


# --- at true size


@pytest.mark.slow
@pytest.mark.full
def test_sdxl_trains_within_20_gib(tmp_path, monkeypatch):
    """One epoch of two samples at 128 px in bf16 from a wired MODEL; the weights are random."""
    monkeypatch.setattr(comfyui, "PATIENCE", 3600)
    checkpoint = tmp_path / "models" / "checkpoints" / "sdxl.safetensors"
    checkpoint.parent.mkdir(parents=True)
    make = [sys.executable, ROOT / "benchmarks" / "full_architecture.py", "--family", "sdxl", "--make-only", "--work"]
    subprocess.run([*make, tmp_path / "made"], check=True)
    (tmp_path / "made" / "single.safetensors").rename(checkpoint)
    settings = 'precision = "bf16"\nmicro_batch = 1\npolicy.gradient_checkpointing = true\noutput.grid_images = 1\n'
    settings += 'guards = ["shapes-alignment"]\noveroptimisation.reward = "none"'  # others are downloaded
    changes = {"algorithm": "ddpo-g", "epochs": 1, "samples_per_epoch": 2, "steps": 4, "resolution": 128, "rank": 16}
    changes |= {"guidance": 5.0, "prompts": "a horse", "settings": settings}  # bf16 takes a CPU seconds a prompt
    graph = train_graph("xl", **changes)
    graph["shapes"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint.name}}
    with Server(tmp_path, flags=("--bf16-unet", "--bf16-text-enc")) as server:
        server.run(graph)
        (metrics,) = server.get("/tdpo/runs/xl/metrics")["metrics"]
    assert metrics["policy/ratio_drift"] == 0
    assert metrics["memory/peak_bytes"] < 20 * 2**30  # of the whole server
