"""The shipped workflows: against the nodes' schemas, and run in a real ComfyUI server with few and small samples."""

import json
import re
import runpy
import shutil
import statistics
import subprocess
from importlib import import_module
from pathlib import Path

import comfyui
import psutil
import pytest
import standin
from backends import OLDEST, ROOT
from comfyui import Server
from PIL import Image
from test_node_schemas import NODES

FOLDER = ROOT / "workflows"
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
SHAPES = [name for name in WORKFLOWS if not name.startswith("sd15")]
# In this order: the second takes what the first leaves
SD15 = ["sd15_align_aesthetic", "sd15_apply_and_compare", "sd15_align_colourfulness"]

WIDGETS = {"Boolean", "Combo", "Float", "Int", "String"}
NOTES = {"MarkdownNote", "Note"}  # the frontend's own, which the server never sees

in_comfyui = pytest.mark.skipif(bool(comfyui.MISSING), reason=comfyui.MISSING)


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def nodes_of(workflow: dict, kind: str = "") -> list[dict]:
    return [node for node in workflow["nodes"] if node["type"] == kind or not kind]


def values_of(node: dict, widgets: list[str]) -> dict:
    """The values of a node by the names of its widgets; the frontend puts a "control after generate" behind a seed."""
    names = [name for widget in widgets for name in ((widget, "control") if widget.endswith("seed") else (widget,))]
    values = node.get("widgets_values", [])
    assert len(values) == len(names), f"{node['type']}: {len(values)} values for {names}"
    return {name: value for name, value in zip(names, values, strict=True) if name != "control"}


# --- against the schemas ---------------------------------------------------------------------------------------------


@pytest.fixture
def schemas(monkeypatch):
    """Node id -> schema, of stand-in objects that know how outputs are called."""
    make = standin.Socket.__init__

    def make_and_name(self, id, options=None, **more):
        make(self, id, options, **more)
        self.display_name = more.get("display_name")

    monkeypatch.setattr(standin.Socket, "__init__", make_and_name)
    standin.install(monkeypatch)
    found = {}
    for node_id, place in NODES.items():
        module, _, name = place.rpartition(".")
        found[node_id] = getattr(import_module(f"comfy_tdpo.nodes.{module}"), name).define_schema()
    return found


def kind(socket) -> str:
    return type(socket).__name__.removesuffix("Input").removesuffix("Output")


def test_there_are_these_and_every_node_is_in_one():
    of_shapes = {"compare_algorithms", "shapes_inspect_neurons", "shapes_quickstart", "shapes_taste"}
    assert set(WORKFLOWS) == {"multi_reward", *of_shapes, *SD15}
    used = {node["type"] for name in WORKFLOWS for node in nodes_of(load(name))}
    assert set(NODES) <= used


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_sockets_are_those_of_the_schemas(schemas, name):
    for node in nodes_of(load(name)):
        if node["type"] not in schemas:
            assert not node["type"].startswith("TDPO")
            continue
        schema = schemas[node["type"]]
        assert {socket["name"] for socket in node["inputs"]} == {socket.id for socket in schema.inputs}
        assert [socket["name"] for socket in node["outputs"]] == [socket.display_name for socket in schema.outputs]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_input_that_has_to_be_wired_is(schemas, name):
    for node in nodes_of(load(name)):
        for socket in schemas[node["type"]].inputs if node["type"] in schemas else []:
            linked = any(s["name"] == socket.id and s.get("link") is not None for s in node["inputs"])
            assert linked or socket.optional or kind(socket) in WIDGETS, f"{node['type']}.{socket.id}"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_values_are_allowed(schemas, name):
    for node in nodes_of(load(name)):
        if node["type"] not in schemas:
            continue
        widgets = {socket.id: socket for socket in schemas[node["type"]].inputs if kind(socket) in WIDGETS}
        required_first = sorted(widgets, key=lambda id: bool(widgets[id].optional))
        for id, value in values_of(node, required_first).items():
            socket = widgets[id]
            if kind(socket) == "Combo":
                assert value in socket.options or id == "lora_name", f"{id}: {value}"
            elif kind(socket) in ("Int", "Float"):
                assert socket.min <= value <= socket.max, f"{id}: {value}"
            else:
                assert isinstance(value, str)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_links_join_sockets_of_one_type(name):
    workflow = load(name)
    nodes = {node["id"]: node for node in nodes_of(workflow)}
    for id, source, output, target, input, type_ in workflow["links"]:
        out, into = nodes[source]["outputs"][output], nodes[target]["inputs"][input]
        assert id in out["links"] and into["link"] == id
        assert "*" in (type_, into["type"]) or type_ == out["type"] == into["type"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_is_tidy(name):
    """A note, groups, nothing over anything else, and nothing that tells of where it was made."""
    workflow = load(name)
    (note,) = nodes_of(workflow, "MarkdownNote")
    assert 100 < len(note["widgets_values"][0]) < 500
    assert workflow["groups"] and all(group["title"] for group in workflow["groups"])
    boxes = [
        (*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
        for node in nodes_of(workflow)
    ]
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:i]:
            apart = left >= other[2] or right <= other[0] or top - 30 >= other[3] or bottom <= other[1] - 30
            assert apart, nodes_of(workflow)[i]
    assert not re.search(r"/(home|root|tmp|Users)/|tdpo_run", json.dumps(workflow))


def test_names_of_runs_and_ids_of_train_nodes_are_not_used_twice():
    """Or one workflow would go on with another's run, or show it."""
    trains = [node for name in WORKFLOWS for node in nodes_of(load(name), "TDPOTrain")]
    assert len({node["widgets_values"][0] for node in trains}) == len(trains)
    assert len({node["id"] for node in trains}) == len(trains)
    assert len({load(name)["id"] for name in WORKFLOWS}) == len(WORKFLOWS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_has_a_thumbnail(name):
    with Image.open(FOLDER / f"{name}.jpg") as picture:
        assert picture.format == "JPEG" and picture.width == picture.height >= 400
    assert (FOLDER / f"{name}.jpg").stat().st_size < 150_000


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_has_a_help_page_true_to_its_inputs(schemas, node_id):
    text = (ROOT / "nodes" / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    assert text.startswith("# ")
    known = {socket.id for socket in (*schemas[node_id].inputs, *schemas[node_id].outputs)}
    known |= {socket.display_name for socket in schemas[node_id].outputs}
    options = {str(option) for socket in schemas[node_id].inputs for option in socket.options or []}
    for item in re.findall(r"^- (\*\*.*?):", text, re.MULTILINE):
        named = re.findall(r"\*\*(.+?)\*\*", item)
        assert set(named) <= known | options, f"{node_id}: {named}"


# --- in a real server ------------------------------------------------------------------------------------------------


def prompt_of(workflow: dict, object_info: dict, **changes) -> dict:
    """The prompt that the frontend makes of a workflow, with widgets of those names changed everywhere."""
    prompt = {}
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    for node in nodes_of(workflow):
        if node["type"] in NOTES:
            continue
        spec = object_info[node["type"]]
        sockets = {
            id: spec["input"][part][id] for part, ids in spec["input_order"].items() if part != "hidden" for id in ids
        }
        widgets = [id for id, (type_, *_) in sockets.items() if isinstance(type_, list) or type_.title() in WIDGETS]
        values = values_of(node, widgets) if widgets else {}
        values |= {id: value for id, value in changes.items() if id in values}
        wired = {s["name"]: sources[s["link"]] for s in node["inputs"] if s.get("link") is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": values | wired}
    return prompt


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("workflows"))
    yield server
    server.end()


SMALL = {"epochs": 2, "samples_per_epoch": 8, "steps": 3, "batch_size": 4, "reset_every": 1, "count": 1, "images": 1}
OUTPUTS = ("PreviewImage", "PreviewAny", "TDPOTrain", "TDPOTaste", "TDPOEvaluate")


@in_comfyui
@pytest.mark.parametrize("name", SHAPES)
def test_it_runs(server, name):
    workflow = load(name)
    prompt = prompt_of(workflow, server.get("/object_info"), **SMALL)
    for train in nodes_of(workflow, "TDPOTrain"):
        prompt[str(train["id"])]["inputs"]["settings"] += "\noutput.recommend_images = 4"
    outputs = server.run(prompt)
    for taste in nodes_of(workflow, "TDPOTaste"):
        outputs = voted_and_run_again(server, prompt, outputs, taste)
    assert {str(node["id"]) for kind in OUTPUTS for node in nodes_of(workflow, kind)} == set(outputs)
    for train in nodes_of(workflow, "TDPOTrain"):
        status = server.status(train["widgets_values"][0].replace(" ", "%20"))
        assert (status["state"], status["epoch"], status["node"]) == ("finished", 2, str(train["id"]))


def voted_and_run_again(server, prompt: dict, outputs: dict, taste: dict) -> dict:
    """The outputs after a vote on each picture, before which the taste alone had run; 4 votes are to be enough."""
    assert set(outputs) == {str(taste["id"])}, "nothing is trained without votes"
    (ballot,) = outputs[str(taste["id"])]["tdpo_ballot"]
    assert (ballot["votes"], ballot["needed"], len(ballot["pictures"])) == (0, 60, 4)
    route = f"/tdpo/tastes/{ballot['name'].replace(' ', '%20')}"
    for i, picture in enumerate(ballot["pictures"]):
        body = {"picture": {"shown": picture["file"]}, "liked": i % 2 == 0}
        assert server.post(f"{route}/votes", body)[0] == 200
    assert [picture["liked"] for picture in server.get(f"{route}/ballot")["pictures"]] == [1, 0, 1, 0]
    assert set(server.run(prompt)) == set(outputs), "nor with too few"
    prompt[str(taste["id"])]["inputs"]["votes_needed"] = 4
    return server.run(prompt)


@in_comfyui
@pytest.mark.slow
@pytest.mark.full
def test_the_quickstart_raises_the_reward_of_the_images(server):
    """As it ships, through ComfyUI's own KSampler: by at least one standard deviation of the images before."""
    workflow = load("shapes_quickstart")
    prompt = prompt_of(workflow, server.get("/object_info"), run_name="as it ships")
    scorers = [str(node["id"]) for node in nodes_of(workflow, "TDPOScoreImages")]  # before, after
    for id in scorers:
        prompt[f"text {id}"] = {"class_type": "PreviewAny", "inputs": {"source": [id, 1]}}
    outputs = server.run(prompt)
    texts = [outputs[f"text {id}"]["text"][0] for id in scorers]
    before, after = ([float(line.split(": ")[1]) for line in text.splitlines()[1:]] for text in texts)
    assert len(before) == len(after) == 16
    gain = (statistics.fmean(after) - statistics.fmean(before)) / statistics.pstdev(before)
    assert gain >= 1, (before, after)


# A checkpoint of Stable Diffusion 1.5's shape in the original layout, with random half-precision weights.
MAKE_CHECKPOINT = """
import sys; sys.path[:0] = [{root!r}, {benchmarks!r}]
from full_architecture import random_pipeline, to_ldm
from safetensors.torch import save_file
from comfy_tdpo.models.shipped import CONFIGS
save_file(to_ldm(random_pipeline(CONFIGS / "sd1")), {path!r})
"""

# The files of the rewards that they name, as benchmarks/reward_inputs.py makes them -> where they are put.
REWARD_FILES = {
    "aesthetic/aesthetic-model.pth": "aesthetic-model.pth",
    "aesthetic/model.safetensors": "clip-vit-large-patch14/model.safetensors",
    "imagereward/ImageReward.pt": "ImageReward.pt",
}


def make_reward_files(folder: Path) -> None:
    """The true architectures with random weights."""
    make = runpy.run_path(str(ROOT / "benchmarks" / "reward_inputs.py"))
    for file, place in REWARD_FILES.items():
        make["save"](folder / place, make["published"](file))
    words = make["bert_vocabulary"](make["BLIPS"]["full"][1][3] - 2)
    (folder / "vocab.txt").write_text(words, encoding="utf-8")


@in_comfyui
@pytest.mark.slow
@pytest.mark.full
def test_those_for_stable_diffusion_run(server, monkeypatch):
    if psutil.virtual_memory().available < 16e9:
        pytest.skip("less than 16 GB of memory are free: in it are the model, twice, and the rewards")
    monkeypatch.setattr(comfyui, "PATIENCE", 1200)
    folder = server.base / "models" / "checkpoints"
    folder.mkdir(exist_ok=True)
    (loader,) = nodes_of(load(SD15[0]), "CheckpointLoaderSimple")
    path = folder / loader["widgets_values"][0]
    script = MAKE_CHECKPOINT.format(root=str(ROOT), benchmarks=str(ROOT / "benchmarks"), path=str(path))
    subprocess.run([OLDEST.python, "-c", script], check=True)
    rewards = server.base / "models" / "tdpo_rewards"
    make_reward_files(rewards)
    small = {
        "epochs": 1,
        "samples_per_epoch": 2,
        "steps": 2,
        "resolution": 64,
        "width": 64,
        "height": 64,
        "batch_size": 1,
        "prompts": "a horse",  # encoded in half precision, which takes a CPU seconds
    }
    settings = 'precision = "fp32"\noutput.grid_images = 1\n'
    try:
        for name in SD15:
            if name == "sd15_align_colourfulness":
                shutil.rmtree(rewards)  # it needs none
            workflow = load(name)
            prompt = prompt_of(workflow, server.get("/object_info"), **small)
            for node in prompt.values():
                if "settings" in node["inputs"]:
                    node["inputs"]["settings"] = settings + node["inputs"]["settings"]
            outputs = server.run(prompt)
            reward = nodes_of(workflow, "TDPORewardModel")[0]["widgets_values"][0]
            for preview in nodes_of(workflow, "PreviewAny"):
                assert outputs[str(preview["id"])]["text"][0].startswith(f"{reward}: ")
    finally:
        path.unlink()
        shutil.rmtree(rewards, ignore_errors=True)
