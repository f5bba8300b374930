"""The table of memory in docs/direct-gradients.md: what is counted without values is what tensors with values hold."""

import pytest
import small_rewards
import torch
from benchmark_files import benchmark
from tiny_models import make_tiny_configs

from comfy_tdpo.trainer.config import make_config

memory = benchmark("direct_memory")


def test_what_is_alive_is_counted_also_where_only_a_graph_holds_it():
    with memory.counted(fake=False) as held:
        x = torch.zeros(1000, requires_grad=True)
        assert held.bytes == 4000
        y = x.exp().exp()  # each exp keeps its result
        assert held.bytes == 12_000
        y.sum().backward()
        assert held.bytes == 12_000, "x, y and the gradient of x"
        assert held.peak() == 20_008, "before that also the first exp, its gradient, the sum and the sum's"
        view = x.detach()[10:]
        assert held.bytes == 12_000, "a view holds nothing of its own"
        del x, y, view
        assert held.bytes == 0


@pytest.mark.parametrize("text", ["no table", f"{memory.BEGIN} no end", f"{memory.END} before {memory.BEGIN}"])
def test_a_page_without_a_place_for_the_table_is_refused_before_the_work(monkeypatch, tmp_path, capsys, text):
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setattr(memory, "CASES", [])
    monkeypatch.setattr("sys.argv", ["direct_memory.py", "--page", str(tmp_path / "page.md")])
    with pytest.raises(SystemExit):
        memory.main()
    assert "page.md without a place for the table; expected the lines" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == text


@pytest.mark.parametrize(("arguments", "is_written"), [("", True), ("--resolution 256", False)])
def test_only_the_table_of_512_pixels_is_written_unasked(monkeypatch, tmp_path, arguments, is_written):
    monkeypatch.setattr(memory, "CASES", [])
    monkeypatch.setattr(memory, "PAGE", tmp_path / "page.md")
    before = f"Text.\n{memory.BEGIN}\nold\n{memory.END}\nMore.\n"
    memory.PAGE.write_text(before)
    monkeypatch.setattr("sys.argv", ["direct_memory.py", *arguments.split()])
    memory.main()
    after = memory.PAGE.read_text()
    assert ("| reward | its precision |" in after) == is_written and (after == before) != is_written
    assert after.startswith(f"Text.\n{memory.BEGIN}\n") and after.endswith(f"{memory.END}\nMore.\n")


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    return make_tiny_configs(tmp_path_factory.mktemp("configs") / "tiny") / "sd1"


@pytest.mark.parametrize(
    ("reward", "precision", "recompute"),
    [
        ("aesthetic", "fp32", memory.OFF),
        pytest.param("hpsv2", "bf16", memory.ALL, marks=pytest.mark.full),
    ],
)
def test_tensors_without_values_take_what_tensors_with_values_do(monkeypatch, sizes, reward, precision, recompute):
    small_rewards.use_small_architectures(monkeypatch)
    draft = {"algorithm": "draft", "last_steps": 2, "samples_per_epoch": 1, "samples_per_update": 1}
    draft |= {"steps": 3, "resolution": 64, "decode_batch": 1, "precision": precision}
    config = make_config(f"sd14-{reward}", overrides=draft | recompute)
    peaks = []
    for fake in (False, True):
        with memory.counted(fake) as held:
            peaks.append(memory.peaks_of(held, memory.make_method(config, sizes)))
    assert peaks[0] == peaks[1]
    assert peaks[0]["in steps"] > peaks[0]["weights"] > 1e5
