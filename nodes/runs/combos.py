"""The choices of combo inputs that the nodes' logic refers to. Light, as ComfyUI reads schemas when it starts."""

from collections.abc import Callable

AUTO = "auto"  # the preset's prompt set; a reward's weights from wherever they are found
CONTINUE, NEW, AS_IT_IS = "continue", "new", "as it is"
RESUME = [CONTINUE, NEW, AS_IT_IS]
WAIT, BACKGROUND = "wait", "background"
MODES = [WAIT, BACKGROUND]
LATEST, RECOMMENDED = "latest", "recommended"
BEST_TRAINING, BEST_HELD_OUT, EPOCH = "best training reward", "best held-out reward", "epoch"
SNAPSHOTS = [LATEST, RECOMMENDED, BEST_TRAINING, BEST_HELD_OUT, EPOCH]
SHAPES_NETWORKS = {"U-Net": "shapes", "flow": "shapes-flow"}  # the models of Shapes by their networks
NO_FILE = "none"
NO_BLEND = "none"
# The share of the LoRA at a fraction of the sampling; `step_0.6` is the tuned model from 60 % on.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: done,
    "power_2": lambda done: done**2,
    "power_4": lambda done: done**4,
    "step_0.6": lambda done: float(done >= 0.6),
    "until_0.5": lambda done: float(done < 0.5),
}
BLENDS = [NO_BLEND, *SCHEDULES]


def check_choice(name: str, value: object, choices: list[str]) -> None:
    """Raise ValueError if a combo input has none of its values: ComfyUI 0.3.64 does not check them."""
    if value not in choices:
        raise ValueError(f"got {name} {str(value)[:100]!r}; expected one of {', '.join(choices)}")
