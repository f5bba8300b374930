"""The progress of drawing and scoring images, on a terminal or elsewhere."""

import sys

from tqdm import tqdm

from comfy_tdpo.counts import number_of

from .streams import SafeStream


class Progress:
    """Progress in images on stderr: for each phase a bar on a terminal, elsewhere a line at every tenth."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._stream = SafeStream(sys.stderr)
        self._phase = ""
        self._bar: tqdm | None = None
        self._tenths = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._end_phase()

    def _end_phase(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._tenths = None, 0

    def tell(self, text: str) -> None:
        print(f"{self._task}: {text}", file=self._stream, flush=True)

    def watch(self, phase: str, done: float, total: int) -> None:
        if phase != self._phase:
            self._end_phase()
            self._phase = phase
        drawn = int(done)
        if not self._stream.isatty():
            tenths = 10 * drawn // total if total else 0
            if tenths > self._tenths:
                self._tenths = tenths
                print(f"{phase}: {drawn} of {number_of(total, 'image')}", file=self._stream, flush=True)
            return
        if self._bar is None:
            self._bar = tqdm(total=total, desc=phase, unit="image", file=self._stream)
        self._bar.update(drawn - self._bar.n)
