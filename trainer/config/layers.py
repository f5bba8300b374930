"""How presets, files and the command line combine into a configuration.

Later layers win: the settings' defaults (the paper's values), the algorithm's row of Table 1, the preset, the preset's
own values for that algorithm, its values for training all weights, a configuration file, the command line.
"""

from pathlib import Path
from typing import Any

from comfy_tdpo.methods import find_algorithm
from comfy_tdpo.models.kind import kind_of
from comfy_tdpo.settings import NONE, PolicySettings, Section, section_of

from .parsing import split_names, with_named_rewards
from .schema import DEFAULT_ALGORITHM, Fields, TrainConfig, config_class, plain_values, validate
from .toml_files import read_toml

OF_LORA = ("rank", "alpha", "targets")  # settings of the policy that do not apply if all weights are trained
PRESETS = Path(__file__).parent.parent / "presets"


def presets() -> list[str]:
    """The names of the shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def make_config(preset: str | None = None, file: Path | None = None, overrides: Fields | None = None) -> TrainConfig:
    """The configuration of `preset`, overridden by a TOML `file` and then by nested `overrides`.

    Without a preset, the model decides, see `preset_for`. Held-out rewards and guards of the preset are left out where
    the file or the overrides give them another role.

    Raises:
        ValueError: a value is invalid; the message is one line that names the setting.
    """
    above = [with_named_rewards(read_toml(file) if file else {}), with_named_rewards(overrides or {})]
    if preset is None:
        preset = preset_for(_topmost(above, "model", "shapes"))
    if preset not in presets():
        raise ValueError(f"got preset {preset!r}; expected one of {', '.join(presets())}")
    base = read_toml(PRESETS / f"{preset}.toml")
    for_algorithm, for_full = base.pop("algorithms", {}), base.pop("full", {})
    algorithm = _algorithm(base.pop("algorithm", DEFAULT_ALGORITHM), *above)
    base = merge(_known(base, config_class(algorithm)), for_algorithm.get(algorithm, {}) | {"algorithm": algorithm})
    base = _without_roles_taken(base, above)
    below = merge(find_algorithm(algorithm).values, base)
    if _trains_all(above):
        _check_no_lora(above, below)
        below = merge(below, for_full)
    for layer in above:
        below = merge(below, layer)
    return validate(below)


def preset_for(model: Any) -> str:
    """The preset for a model as a user names it.

    It is the only one that names its hub id, or else the one of its kind, see `kind_of`.
    """
    named = [name for name in presets() if read_toml(PRESETS / f"{name}.toml")["model"] == model]
    return named[0] if len(named) == 1 else kind_of(str(model))


def override(config: TrainConfig, changes: Fields) -> TrainConfig:
    """`config` with nested `changes` applied."""
    return validate(merge(plain_values(config), with_named_rewards(changes)))


def _without_roles_taken(preset: Fields, above: list[Fields]) -> Fields:
    """The preset, without the held-out rewards and guards to which the layers above it give another role."""
    trained_on = _topmost(above, "rewards", {})
    held_out, guards = (split_names(_topmost(above, name, [])) for name in ("eval_rewards", "guards"))
    if not all(isinstance(names, dict | list) for names in (trained_on, held_out, guards)):  # validation says so
        return preset
    kept = preset | {"eval_rewards": [name for name in preset["eval_rewards"] if name not in {*trained_on, *guards}]}
    kept["guards"] = [name for name in preset.get("guards", []) if name not in {*trained_on, *held_out}]
    watched = preset.get("overoptimisation", {})
    if watched.get("reward") in {*trained_on, *guards}:
        kept["overoptimisation"] = watched | {"reward": NONE}
    return kept


def _algorithm(default: str, in_file: Fields, overrides: Fields) -> str:
    """The algorithm to use. A file overrides its values, so a file made for another algorithm would mix the two."""
    algorithm = _topmost([in_file, overrides], "algorithm", default)
    find_algorithm(algorithm)
    if in_file.get("algorithm", algorithm) != algorithm:
        raise ValueError(
            f"got algorithm {algorithm!r} with a file made for {in_file['algorithm']!r}, whose values would still "
            "apply; expected the same: remove the algorithm and its settings from the file"
        )
    return algorithm


def _known(values: Fields, section: type[Section]) -> Fields:
    """The preset's `values` that are settings of `section`: presets include settings of several algorithms."""
    known: Fields = {}
    for name, value in values.items():
        if info := section.model_fields.get(name):
            inner = section_of(info)
            known[name] = _known(value, inner) if inner else value
    return known


def _trains_all(layers: list[Fields]) -> bool:
    return _topmost(_of_policy(layers), "train", "lora") == "full"


def _of_policy(layers: list[Fields]) -> list[Fields]:
    return [layer["policy"] for layer in layers if isinstance(layer.get("policy"), dict)]


def _check_no_lora(above: list[Fields], below: Fields) -> None:
    """Raise ValueError if a layer `above` the preset sets what only a LoRA has: it would have no effect.

    A file that `--print-config` wrote repeats the values `below`.
    """
    usual = merge({name: PolicySettings.model_fields[name].default for name in OF_LORA}, below.get("policy", {}))
    for policy in _of_policy(above):
        for name in OF_LORA:
            if name in policy and policy[name] != (NONE if usual[name] is None else usual[name]):
                raise ValueError(
                    f"got policy.{name} {policy[name]} with policy.train full, which trains no LoRA; remove "
                    f"policy.{name}, or set policy.train to lora"
                )


def _topmost(layers: list[Fields], name: str, default: Any) -> Any:
    return next((layer[name] for layer in reversed(layers) if name in layer), default)


def merge(base: Fields, over: Fields) -> Fields:
    """`base` overridden by `over`; tables are merged, except `rewards`, which is replaced."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "rewards"
        merged[key] = merge(merged[key], value) if nested else value
    return merged
