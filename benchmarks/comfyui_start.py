"""How much this pack delays ComfyUI's start, as ComfyUI itself reports it, over several starts without a server.

python benchmarks/comfyui_start.py [CHECKOUT]

ComfyUI prints tenths of a second; the pack must stay below 0.3. In November 2026, with ComfyUI 0.3.64, it took 0.0 to
0.1 s on two cores, and up to 0.3 s while twelve other processes competed for them. Nodes load what they need only when
they run.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
STARTS = 3


def seconds_to_import(checkout: Path, base: Path) -> float:
    """Of one start of the ComfyUI in `checkout`, which writes into `base` and ends before it serves."""
    python = checkout / ".venv" / "bin" / "python"
    flags = ["--cpu", "--quick-test-for-ci", "--disable-api-nodes", "--base-directory", str(base)]
    done = subprocess.run([python, "main.py", *flags], cwd=checkout, capture_output=True, text=True)
    found = re.search(r"([\d.]+) seconds( \(IMPORT FAILED\))?: .*tdpo", done.stdout + done.stderr)
    assert found and not found[2], done.stdout + done.stderr
    return float(found[1])


def main() -> None:
    checkout = Path(sys.argv[1]) if len(sys.argv) > 1 else Path.home() / "comfy" / "ComfyUI"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("custom_nodes", "user"):
            (Path(folder) / name).mkdir()
        (Path(folder) / "custom_nodes" / "tdpo").symlink_to(ROOT, target_is_directory=True)
        for _ in range(STARTS):
            print(f"{seconds_to_import(checkout, Path(folder)):.1f} s")


if __name__ == "__main__":
    main()
