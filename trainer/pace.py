"""How long a run will take, from its first sample on, and how long a phase."""

# Seconds that updating takes per second of sampling, until it has been measured: an update runs the model forwards and
# backwards on each step. Shapes takes 0.9, as it decodes much for its critic.
UPDATING = 1.5


class Pace:
    """Estimates from progress; of an epoch only in the first, as later ones are measured by their own seconds."""

    def __init__(self) -> None:
        self._phase, self._began, self._from = "", 0.0, 0.0
        self._seconds: dict[str, float] = {}  # of each phase, as far as it is known

    def see(self, phase: str, done: float, total: int, now: float) -> None:
        """Progress at the time `now`, in seconds."""
        if phase != self._phase:
            self._phase, self._began, self._from = phase, now, done
        elif done >= self._from + 1 and total:  # the start of a phase, when all warms up, says little
            self._seconds[phase] = (now - self._began) / (done - self._from) * total

    def left(self, done: float, total: int) -> float | None:
        """Seconds that are left of the current phase; None as long as too little of it is done."""
        seconds = self._seconds.get(self._phase)
        return seconds * (total - done) / total if seconds is not None and total else None

    def epoch(self) -> float | None:
        """Seconds of an epoch; None before the first sample is done."""
        sampling = self._seconds.get("sampling")
        if sampling is None:  # resumed after it, or a method that samples as it updates
            return self._seconds.get("updating", self._seconds.get("training"))
        return sampling + self._seconds.get("updating", UPDATING * sampling)
