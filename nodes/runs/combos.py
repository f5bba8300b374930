"""The words of the nodes' combo inputs that their logic reads. Light, as schemas are made when ComfyUI starts."""

AUTO = "auto"  # the prompt set that the preset names; a reward's file where it is found
CONTINUE, NEW, AS_IT_IS = "continue", "new", "as it is"
RESUME = [CONTINUE, NEW, AS_IT_IS]
WAIT, BACKGROUND = "wait", "background"
MODES = [WAIT, BACKGROUND]
LATEST, BEST_TRAINING, BEST_HELD_OUT, EPOCH = "latest", "best training reward", "best held-out reward", "epoch"
SNAPSHOTS = [LATEST, BEST_TRAINING, BEST_HELD_OUT, EPOCH]
NO_FILE = "none"


def check_choice(name: str, value: object, choices: list[str]) -> None:
    """Raise ValueError where a combo input has none of its values: ComfyUI 0.3.64 lets anything through."""
    if value not in choices:
        raise ValueError(f"got {name} {str(value)[:100]!r}; expected one of {', '.join(choices)}")
