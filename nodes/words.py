"""The words of the nodes' combo inputs that their logic reads. Light, as schemas are made when ComfyUI starts."""

AUTO = "auto"  # the prompt set that the preset names; a reward's file where it is found
CONTINUE, NEW, AS_IT_IS = "continue", "new", "as it is"
RESUME = [CONTINUE, NEW, AS_IT_IS]
WAIT, BACKGROUND = "wait", "background"
MODES = [WAIT, BACKGROUND]
LATEST, BEST_TRAINING, BEST_HELD_OUT, EPOCH = "latest", "best training reward", "best held-out reward", "epoch"
SNAPSHOTS = [LATEST, BEST_TRAINING, BEST_HELD_OUT, EPOCH]
NO_FILE = "none"
