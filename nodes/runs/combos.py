"""The choices of combo inputs that the nodes' logic refers to. Light, as ComfyUI reads schemas when it starts."""

AUTO = "auto"  # the preset's prompt set; a reward's weights from wherever they are found
CONTINUE, NEW, AS_IT_IS = "continue", "new", "as it is"
RESUME = [CONTINUE, NEW, AS_IT_IS]
WAIT, BACKGROUND = "wait", "background"
MODES = [WAIT, BACKGROUND]
LATEST, RECOMMENDED = "latest", "recommended"
BEST_TRAINING, BEST_HELD_OUT, EPOCH = "best training reward", "best held-out reward", "epoch"
SNAPSHOTS = [LATEST, RECOMMENDED, BEST_TRAINING, BEST_HELD_OUT, EPOCH]
NO_FILE = "none"
NO_BLEND = "none"
BLENDS = [NO_BLEND, "linear", "power_2", "power_4", "step_0.6"]


def check_choice(name: str, value: object, choices: list[str]) -> None:
    """Raise ValueError if a combo input has none of its values: ComfyUI 0.3.64 does not check them."""
    if value not in choices:
        raise ValueError(f"got {name} {str(value)[:100]!r}; expected one of {', '.join(choices)}")
