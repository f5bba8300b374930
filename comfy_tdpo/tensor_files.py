"""Safetensors files that are the same to the byte for the same content."""

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors`, on any device, and `metadata` to `path`, readable for whom the user's other files are.

    safetensors' own `save_file` leaves metadata in the order of a hash map, and some of its versions make the file
    private to the user.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = memoryview(save(on_cpu, metadata))
    end = 8 + int.from_bytes(content[:8], "little")  # of the header, after its length
    header = json.dumps(json.loads(bytes(content[8:end])), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(content[end:])
