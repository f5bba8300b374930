"""The nodes' schemas against their own code and the trainer's configuration, with stand-ins for ComfyUI's objects."""

import inspect
import sys
from importlib import import_module
from typing import get_args

import pytest
import standin

from comfy_tdpo.methods import ALGORITHMS
from comfy_tdpo.methods.sections import CriticSettings, NeuronSettings
from comfy_tdpo.rewards import reward_names
from comfy_tdpo.trainer import config

NODES = {
    "TDPORewardModel": "reward_model.RewardModel",
    "TDPOTaste": "taste.Taste",
    "TDPOTemporalCritic": "temporal_critic.TemporalCritic",
    "TDPOTrain": "train.Train",
    "TDPOEvaluate": "evaluate.Evaluate",
    "TDPONeuronInspector": "neuron_inspector.NeuronInspector",
    "TDPOApplyLoRA": "apply_lora.ApplyLoRA",
    "TDPOScoreImages": "score_images.ScoreImages",
    "TDPOShapesModel": "shapes_model.ShapesModel",
    "TDPOPrompts": "prompts.Prompts",
}


@pytest.fixture
def node(monkeypatch):
    """The class of a node by its id."""
    standin.install(monkeypatch)

    def load(node_id: str):
        module, _, name = NODES[node_id].rpartition(".")
        return getattr(import_module(f"comfy_tdpo.nodes.{module}"), name)

    return load


@pytest.mark.parametrize("node_id", NODES)
def test_the_inputs_are_what_execute_takes(node, node_id):
    cls = node(node_id)
    schema, parameters = cls.define_schema(), inspect.signature(cls.execute).parameters
    assert schema.node_id == node_id
    assert [socket.id for socket in schema.inputs] == list(parameters)
    for socket in schema.inputs:
        has_default = parameters[socket.id].default is not inspect.Parameter.empty
        assert has_default == bool(socket.optional), socket.id


@pytest.mark.parametrize("node_id", NODES)
def test_what_reads_constants_takes_inputs_by_their_names(node, node_id):
    cls = node(node_id)
    ids = {socket.id for socket in cls.define_schema().inputs}
    for method in ("fingerprint_inputs", "validate_inputs"):
        if hasattr(cls, method):
            parameters = inspect.signature(getattr(cls, method)).parameters.values()
            named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
            assert named <= ids


@pytest.mark.parametrize("node_id", NODES)
def test_everything_says_what_it_is(node, node_id):
    schema = node(node_id).define_schema()
    assert schema.category == "TDPO" and schema.display_name and schema.description.endswith(".")
    for socket in [*schema.inputs, *schema.outputs]:
        assert socket.tooltip and socket.tooltip[-1] in ".,", socket.id
    ids = [socket.id for socket in [*schema.inputs, *schema.outputs]]
    assert len(ids) == len(set(ids)), "ComfyUI refuses an input and an output of one id"


@pytest.mark.parametrize("node_id", NODES)
def test_defaults_are_allowed(node, node_id):
    for socket in node(node_id).define_schema().inputs:
        if socket.options is not None:
            assert socket.default in socket.options, socket.id
        if socket.min is not None:
            assert socket.min <= socket.default <= socket.max, socket.id


def options(cls, input_id: str) -> set[str]:
    return next(set(socket.options) for socket in cls.define_schema().inputs if socket.id == input_id)


def test_choices_are_the_trainers(node):
    critic, train = node("TDPOTemporalCritic"), node("TDPOTrain")
    assert options(train, "algorithm") == set(ALGORITHMS)
    assert options(critic, "activation") == set(get_args(CriticSettings.model_fields["activation"].annotation))
    assert options(critic, "decoder") == {"full", "tiny", "one.safetensors"}
    assert options(critic, "reset") == set(get_args(NeuronSettings.model_fields["reset"].annotation))
    assert options(critic, "activation_data") == set(get_args(NeuronSettings.model_fields["data"].annotation))
    assert options(node("TDPORewardModel"), "reward") == set(reward_names())


def test_the_critics_defaults_are_the_papers(node):
    cls = node("TDPOTemporalCritic")
    (settings,) = cls.execute(**{socket.id: socket.default for socket in cls.define_schema().inputs}).values
    assert config.validate(settings) == config.validate({})


def test_the_critics_decoder_is_one_of_comfyuis_files(node, monkeypatch):
    cls, files = node("TDPOTemporalCritic"), ["taesd_decoder.pth", "taesd_encoder.pth"]
    folders = sys.modules["folder_paths"]
    monkeypatch.setattr(folders, "get_filename_list", lambda kind: files if kind == "vae_approx" else [])
    monkeypatch.setattr(folders, "get_full_path", lambda kind, name: f"/models/{kind}/{name}", raising=False)
    assert options(cls, "decoder") == {"full", "tiny", "taesd_decoder.pth"}
    values = {socket.id: socket.default for socket in cls.define_schema().inputs} | {"read_every": 4}
    (chosen,) = cls.execute(**values | {"decoder": "taesd_decoder.pth"}).values
    assert config.validate(chosen).critic.decoder == "/models/vae_approx/taesd_decoder.pth"
    assert config.validate(chosen).critic.read_every == 4
    for name in ("taesd_encoder.pth", "../secret.pth"):
        with pytest.raises(ValueError, match="got decoder .* not in models/vae_approx; put it there"):
            cls.execute(**values | {"decoder": name})


def test_a_name_that_comes_along_a_wire_is_checked_later(node):
    cls = node("TDPOTrain")
    assert cls.validate_inputs(None) is True
    assert cls.validate_inputs("my run") is True
    assert "expected a name" in cls.validate_inputs("../x")
    assert "expected text" in cls.validate_inputs(["x"])
    fingerprint = cls.fingerprint_inputs(run_name=None, mode="wait")
    assert fingerprint != fingerprint, "NaN: nothing is known, so it runs"
