"""The live node: its logic without a page, under Node or Chromium, and what it shows in a real browser with ComfyUI's
real frontend and server.
"""

import base64
import io
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import comfyui
import pytest
from backends import FRONTEND, ROOT
from comfyui import Server
from PIL import Image

WEB = ROOT / "nodes" / "web"

# --- what needs no page ----------------------------------------------------------------------------------------------

# Evaluates lines of JavaScript, in which `m` is the module; one line of JSON each.
REPL = """
const lines = require("readline").createInterface({ input: process.stdin });
(async () => {
  const m = await import(process.argv[1]);
  for await (const line of lines) console.log(JSON.stringify({ value: await new Function("m", line)(m) }));
})();
"""

# What runs.js imports of ComfyUI: answers of the server, by route, and its events.
FAKE_API = """
const target = new EventTarget();
export const answers = {};
export const asked = [];
export const api = {
  addEventListener: (...args) => target.addEventListener(...args),
  removeEventListener: (...args) => target.removeEventListener(...args),
  tell: (type, detail) => target.dispatchEvent(new CustomEvent(type, { detail })),
  apiURL: (route) => "/api" + route,
  async fetchApi(route, options) {
    asked.push((options?.method ?? "GET") + " " + route);
    const [status, body] = (await answers[route]?.()) ?? [404, { error: "no such route" }];
    if (status === 0) throw new TypeError("Failed to fetch");
    return new Response(JSON.stringify(body), { status });
  },
};
"""


def as_url(source: str) -> str:
    return "data:text/javascript;base64," + base64.b64encode(source.encode()).decode()


def module(name: str, **imports: str) -> str:
    """A module of ours as a URL that can be imported from anywhere, with its imports replaced by others' URLs."""
    source = (WEB / f"{name}.js").read_text(encoding="utf-8")
    return as_url(re.sub(r'from ".*?(\w+)\.js"', lambda match: f'from "{imports[match[1]]}"', source))


@pytest.fixture(scope="module")
def javascript():
    """(the URL of a module, the body of a function of it) -> what that returns."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js to run the live node's own logic in; install node 20 or newer")

    def run(url: str, body: str):
        line = " ".join(body.split())
        done = subprocess.run([node, "-e", REPL, url], input=line + "\n", capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout, done.stderr
        return json.loads(done.stdout).get("value")

    return run


@pytest.fixture(scope="module")
def evaluate(javascript):
    """The value of an expression in which `m` is model.js."""
    return lambda expression: javascript(module("model"), f"return {expression}")


ROOT_GRAPH = """
  const train = { id: 3 };
  const inner = { nodes: [{ id: 1 }, train] };
  const middle = { nodes: [{ id: 7, subgraph: inner }] };
  const root = { nodes: [{ id: 3 }, { id: 12, subgraph: inner }, { id: 15, subgraph: middle }] };
"""


def test_a_node_in_a_subgraph_is_known_by_every_path_to_it(javascript):
    ids = javascript(module("model"), f"{ROOT_GRAPH} return m.executionIds(train, root)")
    assert ids == ["12:3", "15:7:3"]


def test_a_node_of_the_root_is_known_by_its_own_id(javascript):
    ids = javascript(module("model"), f"{ROOT_GRAPH} return m.executionIds(root.nodes[0], root)")
    assert ids == ["3"]


def test_the_nodes_of_all_subgraphs_are_found_once(javascript):
    ids = javascript(module("model"), f"{ROOT_GRAPH} return m.nodesWithin(root).map(({{ id }}) => id)")
    assert ids == [3, 12, 1, 3, 15, 7]


@pytest.mark.parametrize(
    ("name", "runs", "remembered", "chosen"),
    [
        (None, [], None, None),
        (None, [], "gone", None),
        (None, [("b", "4", "finished"), ("a", "4", "stopped")], None, "b"),
        (None, [("b", "4", "finished"), ("a", "4", "stopped")], "a", "a"),
        (None, [("b", "4", "finished"), ("a", "4", "running")], "b", "a"),
        (None, [("b", "4", "finished")], "gone", "b"),
        (None, [("c", "9", "running"), ("b", "4", "finished")], None, "b"),
        (None, [("c", "12:4", "running")], None, None),
        (None, [("c", None, "running")], None, None),
        (None, [("c", "9", "finished")], "c", "c"),
        ("d", [("b", "4", "finished"), ("d", "9", "finished")], "b", "d"),
        ("d", [("d-2", "9", "stopped"), ("d", "9", "finished")], None, "d-2"),
        ("d", [("d-too", "9", "stopped")], None, None),
        ("d", [("d-2", "9", "stopped"), ("d", "9", "finished")], "d", "d"),
        ("d", [("b", "4", "running", "ours"), ("d", "9", "finished")], None, "b"),
        ("d", [("b", "4", "running", "theirs"), ("d", "9", "finished")], None, "d"),
        ("d", [("b", "4", "running"), ("d", "9", "finished")], None, "d"),
        ("d", [("d", "4", "finished"), ("d-2", "4", "running")], "d", "d-2"),
        (None, [("b", "4", "running", "theirs")], None, None),
        ("d", [("b", "4", "finished")], None, None),
        ("d", [("b", "4", "finished")], "b", "b"),
    ],
)
def test_which_run_a_node_shows(evaluate, name, runs, remembered, chosen):
    told = [dict(zip(("id", "node", "state", "workflow"), run, strict=False)) for run in runs]
    asked = ", ".join(map(json.dumps, (told, {"ids": ["4"], "workflow": "ours"}, remembered, name)))
    assert evaluate(f"m.chooseRun({asked})") == chosen


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("micro_batch = 4\n kl.target=0.1\n# kl.horizon = 3", ["micro_batch", "kl.target"]),
        ("[output]\ngrid_images = 4\n[policy]\nreplay = 1", ["output.grid_images", "policy.replay"]),
        ("kl = { target = 1 }\nnot toml", ["kl"]),
        ('[ kl ]\n"target" = 1\n[ "policy" . ema ] # why\n x . y = 2', ["kl.target", "policy.ema.x.y"]),
        ("[kl]\n[a-b]\ntarget = 1\n[[c]]\ntarget = 1\n[d e]\ntarget = 1", ["a-b.target", "?.target", "?.target"]),
        ('"kl.target" = 1', ['"kl.target"']),
    ],
)
def test_the_names_of_settings_are_read_from_their_lines(evaluate, text, names):
    assert evaluate(f"m.settingNames({json.dumps(text)})") == names


USED_BY = {
    "critic": ["r", "g"],
    "resets": ["r"],
    "settings": {"kl.target": ["r", "g"], "kl.form": ["r", "g"], "policy.replay": ["g"], "last_steps": ["draft"]}
    | {f"critic.{name}": ["r", "g", "off"] for name in ("lr", "step", "enabled")},
    "effects": {"critic.lr": ["r", "g"], "critic.step": ["r", "g"]},
}
NO_RESETS = "g resets no neurons, so the reset settings of TDPO Temporal Critic have no effect."


@pytest.mark.parametrize(
    ("algorithm", "wired", "settings", "text", "refused"),
    [
        ("r", True, "kl.target = 1\nseed = 3", "", False),
        ("g", False, "", "", False),
        ("g", True, "", NO_RESETS, False),
        ("draft", False, "last_steps = 2\npolicy.lr = 1", "", False),
        ("draft", True, "", "draft uses no critic: disconnect it, or the run is refused.", True),
        ("r", False, "policy.replay = 1", "In settings, remove what is for other algorithms: policy.replay.", True),
        ("g", False, "last_steps = 1\nkl = {}", "In settings, remove what is for other algorithms: last_steps.", True),
        (
            "draft",
            False,
            "kl = {}\n[policy]\nreplay = 1",
            "In settings, remove what is for other algorithms: kl, policy.replay.",
            True,
        ),
        ("", True, "kl = {}", "", False),
        ("g", True, '[neurons]\nreset = "active"', "", False),
        ("g", True, "neurons.every = 2", NO_RESETS, False),
        ("off", True, "[critic]\nenabled = true\nlr = 1", "", False),
        ("off", True, "critic = { enabled = true }", "", False),
        ("off", True, "neurons.reset = 'none'", "off uses no critic: disconnect it, or the run is refused.", True),
        (
            "off",
            False,
            "critic.lr = 1\n[critic]\nstep = true",
            "In settings, these have no effect: critic.lr, critic.step.",
            False,
        ),
        (
            "draft",
            False,
            "critic.lr = 1",
            "In settings, remove what is for other algorithms: critic.lr.",
            True,
        ),
    ],
)
def test_what_an_algorithm_does_not_use_is_said(evaluate, algorithm, wired, settings, text, refused):
    asked = ", ".join(map(json.dumps, (algorithm, USED_BY, {"wired": wired, "settings": settings})))
    assert evaluate(f"m.unused({asked})") == {"text": text, "refused": refused}


def epochs(*numbers: int) -> str:
    return json.dumps([{"epoch": number} for number in numbers])


@pytest.mark.parametrize(
    ("known", "fresh", "last", "merged"),
    [
        ((), (1,), 1, [1]),
        ((1, 2), (3,), 3, [1, 2, 3]),
        ((2,), (1, 2, 3), 3, [1, 2, 3]),
        ((1, 2, 3, 4), (3,), 3, [1, 2, 3]),
    ],
    ids=["first", "next", "late and twice", "a resumed run begins anew"],
)
def test_metrics_come_together(evaluate, known, fresh, last, merged):
    rows = evaluate(f"m.mergeMetrics({epochs(*known)}, {epochs(*fresh)}, {last})")
    assert [row["epoch"] for row in rows] == merged


@pytest.mark.parametrize(("known", "last"), [((), 0), ((1, 2), 2), ((1, 2, 4), 2), ((3,), 0)])
def test_the_cursor_stands_before_the_first_gap(evaluate, known, last):
    assert evaluate(f"m.cursor({epochs(*known)})") == last


def test_the_trained_reward_comes_first_and_what_is_no_number_is_left_out(evaluate):
    status = {"reward": "a + 0.5 b", "eval_rewards": ["gold"]}
    rows = [
        {"epoch": 1, "eval/gold/mean": 0.5, "reward/a + 0.5 b/mean": 1, "reward/a + 0.5 b/std": 2, "eval/x/mean": 1},
        {"epoch": 2, "eval/gold/mean": None, "reward/a + 0.5 b/mean": 2, "reward/a + 0.5 b/std": 2},
    ]
    curves = evaluate(f"m.curves({json.dumps(status)}, {json.dumps(rows)})")
    assert [(curve["name"], curve["kind"], len(curve["points"])) for curve in curves] == [
        ("a + 0.5 b", "trained", 2),
        ("gold", "held-out", 1),
        ("x", "held-out", 1),
    ]


def test_the_rewards_of_a_sum_follow_it_and_are_shown_once(evaluate):
    status = {"reward": "a + 0.5 b", "eval_rewards": ["gold", "b"]}
    row = {f"reward/{name}/mean": 1 for name in ("a + 0.5 b", "a", "b")} | {"eval/gold/mean": 1, "eval/b/mean": 1}
    curves = evaluate(f"m.curves({json.dumps(status)}, {json.dumps([{'epoch': 1} | row])})")
    kinds = [(curve["name"], curve["kind"]) for curve in curves]
    assert kinds == [("a + 0.5 b", "trained"), ("a", "part"), ("b", "part"), ("gold", "held-out")]
    roles = evaluate(f"m.chartOf({json.dumps(status)}, {json.dumps([{'epoch': 1} | row])}).panels.map((p) => p.role)")
    assert roles == ["trained on", "part of the sum", "part of the sum", "held out"]


def row_of(id: str, reward: str = "r", watched: str | None = "gold", epochs: int = 2, spread: float = 2) -> dict:
    """A row of the table of runs, whose training reward rises by 1 an epoch and whose held-out rewards fall by 0.5."""
    held_out = {f"eval/{name}/mean": 0.5 for name in ("other", watched) if name}
    rows = [
        {"epoch": n, f"reward/{reward}/mean": n, f"reward/{reward}/std": spread}
        | {key: value - n / 2 for key, value in held_out.items()}
        | {key.replace("mean", "std"): 1 for key in held_out}
        for n in range(1, epochs + 1)
    ]
    return {"id": id, "color": 0, "watched": watched, "metrics": rows, "status": {"reward": reward, "eval_rewards": []}}


def panels_of(evaluate, *rows: dict) -> list[tuple]:
    """Of the chart of these rows: name and role of each panel, whose lines, and their last values as text."""
    found = evaluate(
        f"m.chartOfRuns({json.dumps(rows)}).panels.map(({{ name, role, lines, read }}) => "
        "[name, role, lines.map(({ name }) => name), lines.map(({ points }) => read(points))])"
    )
    return [tuple(panel) for panel in found]


def test_runs_on_one_reward_are_compared_in_its_unit_and_others_in_standard_deviations(evaluate):
    alike = panels_of(evaluate, row_of("a"), row_of("b", epochs=4))
    assert alike == [
        ("r", "training reward", ["a", "b"], ["2.00", "4.00"]),
        ("gold", "watched reward", ["a", "b"], ["\N{MINUS SIGN}0.50", "\N{MINUS SIGN}1.50"]),
    ]
    other = row_of("b", "q", "judge", epochs=4)
    assert panels_of(evaluate, row_of("a"), other, row_of("c", "p", None, spread=0)) == [
        ("training reward", "change since epoch 1", ["a", "b"], ["+0.50 spreads", "+1.50 spreads"]),
        (
            "watched reward",
            "change since epoch 1",
            ["a", "b"],
            ["\N{MINUS SIGN}0.50 spreads", "\N{MINUS SIGN}1.50 spreads"],
        ),
    ], "without a spread there is no such unit"
    assert panels_of(evaluate, row_of("a", watched=None)) == [("r", "training reward", ["a"], ["2.00"])]
    assert panels_of(evaluate, row_of("a", epochs=0)) == []


def test_an_overlay_ends_with_its_longest_run(evaluate):
    rows = json.dumps([row_of("a"), row_of("b", epochs=7)])
    assert evaluate(f"m.chartOfRuns({rows}).last") == 7
    assert evaluate("m.chartOfRuns([]).spoken") == "No epoch has finished yet"


@pytest.mark.parametrize(
    ("low", "high", "count"), [(3.9, 7.2, 2), (0.55, 0.8, 2), (-1, 1, 5), (1e-4, 3e-4, 3), (0, 1e6, 6), (0.76, 0.84, 2)]
)
def test_ticks_are_round_inside_and_few(evaluate, low, high, count):
    ticks = evaluate(f"m.ticks({low}, {high}, {count})")
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in zip(ticks, ticks[1:], strict=False)}
    assert 2 <= len(ticks) <= count + 1
    assert low <= ticks[0] and ticks[-1] <= high
    assert steps == {1}
    assert float(f"{ticks[1] - ticks[0]:.0e}") == pytest.approx(ticks[1] - ticks[0])  # one digit


def test_labels_of_ticks_have_room_and_differ(evaluate):
    """A label is 10 pixels high; two of the usual ticks are 9 apart at the least height of an axis."""
    lows, sizes = (3.05, 3.1, 0.0123, -0.004, -1e-5, 0, -2, 990.5), (0.0005, 0.003, 0.029, 0.58, 2.9, 5.8, 41)
    axes = list(itertools.product(lows, sizes, (26, 40, 52, 90, 200)))
    ask = f"{json.dumps(axes)}.map(([low, size, height]) => m.ticksWithRoom(low, low + size, height))"
    for (low, size, height), ticks, words in zip(axes, *evaluate(f"[{ask}, {ask}.map(m.labels)]"), strict=True):
        assert len(ticks) >= 2 and low - 1e-9 * size <= ticks[0] and ticks[-1] <= low + size + 1e-9 * size
        assert (ticks[1] - ticks[0]) / size * height >= 12 - 1e-6
        assert len(set(words)) == len(words), words
        numbers = [float(word.replace("\N{MINUS SIGN}", "-")) for word in words]
        assert numbers == pytest.approx(ticks, abs=0.05 * size, rel=0)
        assert not any(number == 0 and "\N{MINUS SIGN}" in word for word, number in zip(words, numbers, strict=True))


@pytest.mark.parametrize(("low", "high"), [(1, 2), (1, 15), (1, 100), (1, 9999)])
def test_epochs_are_whole(evaluate, low, high):
    ticks = evaluate(f"m.ticks({low}, {high}, 6, true)")
    assert len(ticks) >= 2 and all(float(tick).is_integer() for tick in ticks)


@pytest.mark.parametrize(
    ("epochs", "done", "last"),
    [(15, 1, 10), (15, 11, 15), (6, 2, 6), (500, 3, 10), (500, 35, 40), (1, 1, 2), (5, 9, 9)],
)
def test_a_curve_fills_its_axes_soon(evaluate, epochs, done, last):
    assert evaluate(f"m.lastShown({epochs}, {done})") == last


def test_limits_are_never_empty(evaluate):
    for values in ([], [0], [5], [-2, -2], [1, 3]):
        points = json.dumps([{"value": value, "spread": 0} for value in values])
        low, high = evaluate(f"m.limits({points})")
        assert low < high and all(low < value < high for value in values)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("m.duration(0)", "0 s"),
        ("m.duration(75.4)", "75 s"),
        ("m.duration(100)", "2 min"),
        ("m.duration(7500)", "2 h 5 min"),
        ("m.duration(400000)", "5 days"),
        ("m.duration(null)", ""),
        ("m.duration(-3)", ""),
        ("m.number(5.1432)", "5.14"),
        ("m.number(-0.128)", "\N{MINUS SIGN}0.13"),
        ("m.number(-0.004)", "\N{MINUS SIGN}0.004"),
        ("m.number(-0)", "0.00"),
        ("m.number(0.58 - 0.68)", "\N{MINUS SIGN}0.10"),
        ("m.number(1234.5)", "1235"),
        ("m.number(1e-5)", "1.0e\N{MINUS SIGN}5"),
        ("m.number(NaN)", "\N{EN DASH}"),
        ("m.signed(0.4)", "+0.40"),
        ("m.reading([])", ""),
        ("m.reading([{ value: 5.14, spread: 1.2 }])", "5.14"),
        ("m.reading([{ value: 5.14, spread: 1.2 }, { value: 6.74, spread: 1 }])", "6.74 (+1.33 spreads)"),
        ("m.reading([{ value: 0.8, spread: 0 }, { value: 0.7, spread: 0 }])", "0.70 (\N{MINUS SIGN}0.10)"),
        ("m.reading([{ value: 5, spread: 1 }, { value: 4.999, spread: 1 }])", "5.00 (0.00 spreads)"),
        ("m.reading([{ value: 5, spread: 1 }, { value: 4.99, spread: 1 }])", "4.99 (\N{MINUS SIGN}0.010 spreads)"),
        ("m.labels([-0.5, 0, 0.5])", ["\N{MINUS SIGN}0.5", "0.0", "0.5"]),
        ("m.labels([0, 2e-5])", ["0", "2e\N{MINUS SIGN}5"]),
        ("m.heading('gold', 'held out', '0.58', 300)", ["gold", "held out"]),
        ("m.heading('shapes-aesthetic', 'trained on', '6.20 (+1.00 SD)', 264)", ["shapes-aesthetic", ""]),
        ("m.heading('shapes-aesthetic', 'trained on', '6.20 (+1.00 SD)', 200)", ["shapes-aesthe…", ""]),
        ("m.position({ state: 'running', epoch: 4, epochs: 15 })", "Epoch 5 of 15"),
        ("m.position({ state: 'running', epoch: 15, epochs: 15 })", "Epoch 15 of 15"),
        ("m.position({ state: 'stopped', epoch: 4, epochs: 15 })", "4 of 15 epochs"),
        ("m.position({ state: 'running', phase: 'recommending', epoch: 15, epochs: 15 })", "15 of 15 epochs"),
        ("m.title({ state: 'running', phase: 'recommending', epoch: 15, epochs: 15 })", "Choosing the LoRA"),
        ("m.title({ state: 'running', phase: 'sampling', epoch: 14, epochs: 15 })", "Training"),
        ("m.title({ state: 'finished', phase: 'recommending', epoch: 15, epochs: 15 })", "Finished"),
        ("m.phaseText({ phase: 'sampling', phase_done: 48, phase_total: 96 })", "Sampling, 48 of 96"),
        ("m.phaseText({ phase: 'sampling', phase_done: 48.9, phase_total: 96 })", "Sampling, 48 of 96"),
        ("m.phaseText({ phase: 'loading', phase_done: 0, phase_total: 0 })", "Loading…"),
        ("m.phaseText({ phase: '' })", ""),
        ("m.fraction(5, 0)", 0),
        ("m.fraction(7, 5)", 1),
        ("m.shortened('shapes-aesthetic + 0.5 shapes-judge', 63)", "shapes-ae…"),
        ("m.shortened('gold', 63)", "gold"),
        ("m.bytes(0)", "0 bytes"),
        ("m.bytes(999)", "999 bytes"),
        ("m.bytes(1000)", "1.0 kB"),
        ("m.bytes(31_400_000)", "31 MB"),
        ("m.bytes(9_960_000)", "10 MB"),
        ("m.bytes(2_350_000_000)", "2.4 GB"),
        ("m.bytes(4e15)", "4000 TB"),
    ],
)
def test_words_and_numbers(evaluate, expression, words):
    assert evaluate(expression) == words


STATUS = {"id": "a", "node": "4", "state": "running", "epoch": 2, "epochs": 5, "reward": "r", "eval_rewards": []}


@pytest.fixture
def store(javascript):
    """Runs a body with `runs`, `api`, `answers`, `asked`, a status `S`, and `settle`, which waits a moment."""
    fake = as_url(FAKE_API)

    def run(body: str):
        url = module("runs", api=fake, model=module("model"))
        names = f"""
          const {{ api, answers, asked }} = await import("{fake}");
          const {{ runs }} = m;
          const S = {json.dumps(STATUS)};
          const settle = () => new Promise((done) => setTimeout(done, 20));
        """
        return javascript(url, f"return (async () => {{ {names} {body} }})()")

    return run


RUNS = """
  answers["/tdpo/runs"] = () => [200, { runs: [S] }];
  answers["/tdpo/runs/a/metrics?after=0"] = () => [200, { metrics: [{ epoch: 1 }, { epoch: 2 }], next: 2 }];
"""


def test_a_page_that_comes_late_asks_for_what_it_missed(store):
    state = store(f"""{RUNS}
      runs.watch(() => runs.load("a")); await settle();
      return [asked, runs.metrics("a").map(({{ epoch }}) => epoch)];
    """)
    assert state == [["GET /tdpo/runs", "GET /tdpo/runs/a/metrics?after=0"], [1, 2]]


@pytest.mark.parametrize(
    ("place", "cell"),
    [
        ((0, 50), {"row": 0, "col": 0}),
        ((199, 149), {"row": 1, "col": 3}),
        ((100, 49), None),
        ((100, 150), None),
        ((51, 101), {"row": 1, "col": 1}),
    ],
)
def test_which_image_of_a_grid_is_clicked(evaluate, place, cell):
    """A grid of 2 x 4 images, twice as wide as high, in a square of 200 pixels: from 50 to 150 in height."""
    x, y = place
    box, image = "{width: 200, height: 200}", "{width: 640, height: 320}"
    assert evaluate(f"m.cellAt({{x: {x}, y: {y}}}, {box}, {image}, [2, 4])") == cell


@pytest.mark.parametrize(
    ("reward", "taste"), [("taste:mine", "mine"), ("2 taste:my own / 3 + x", "my own"), ("x", "my taste")]
)
def test_votes_go_to_the_taste_that_is_trained_on(evaluate, reward, taste):
    assert evaluate(f"m.tasteOf({json.dumps({'reward': reward})})") == taste


@pytest.mark.parametrize(("epoch", "grid"), [(None, 6), (7, 6), (5, 3), (0, 0), (-1, None)])
def test_which_grid_belongs_to_an_epoch(evaluate, epoch, grid):
    assert evaluate(f"m.gridOf([0, 3, 6], {json.dumps(epoch)})") == grid


def test_events_that_were_missed_are_asked_for(store):
    state = store(f"""{RUNS}
      answers["/tdpo/runs/a/metrics?after=2"] = () => [200, {{ metrics: [{{ epoch: 3 }}, {{ epoch: 4 }}], next: 4 }}];
      runs.watch(() => runs.load("a")); await settle();
      api.tell("tdpo.progress", {{ ...S, epoch: 4, metrics: {{ epoch: 4 }} }}); await settle();
      return [asked.length, runs.find("a").epoch, runs.metrics("a").map(({{ epoch }}) => epoch)];
    """)
    assert state == [3, 4, [1, 2, 3, 4]]


def test_an_epoch_that_nobody_has_is_asked_for_once(store):
    asked = store("""
      answers["/tdpo/runs"] = () => [200, { runs: [S] }];
      answers["/tdpo/runs/a/metrics?after=0"] = () => [200, { metrics: [], next: 0 }];
      runs.watch(() => runs.load("a")); await settle();
      return asked;
    """)
    assert asked == ["GET /tdpo/runs", "GET /tdpo/runs/a/metrics?after=0"]


def test_an_answer_that_an_event_has_overtaken_does_not_turn_time_back(store):
    state = store("""
      let answer; answers["/tdpo/runs"] = () => new Promise((resolve) => (answer = resolve));
      runs.watch(() => {}); await settle();
      api.tell("tdpo.progress", { ...S, epoch: 3, metrics: null });
      answer([200, { runs: [S] }]); await settle();
      return runs.list.map(({ epoch }) => epoch);
    """)
    assert state == [3]


def test_a_server_that_does_not_answer_is_told_and_asked_again(store):
    state = store("""
      answers["/tdpo/runs"] = () => [0];
      globalThis.setTimeout = ((wait) => (work, time) => wait(work, time > 1000 ? 5 : time))(setTimeout);
      const seen = []; const end = runs.watch(() => seen.push(runs.unreachable)); await settle();
      answers["/tdpo/runs"] = () => [200, { runs: [S] }]; await settle();
      end();
      return [seen[0], seen.at(-1), runs.list.length];
    """)
    assert state == [True, False, 1]


def test_stopping(store):
    state = store("""
      answers["/tdpo/runs/a/stop"] = () => [200, { ...S, state: "stopping" }];
      await runs.stop("a");
      const first = runs.find("a").state;
      answers["/tdpo/runs/a/stop"] = () => [409, { error: "not running" }];
      answers["/tdpo/runs"] = () => [200, { runs: [{ ...S, state: "stopped" }] }];
      await runs.stop("a");
      answers["/tdpo/runs/a/stop"] = () => [500, { error: "out of order" }];
      const error = await runs.stop("a").catch((error) => error.message);
      return [first, runs.find("a").state, error];
    """)
    assert state == ["stopping", "stopped", "out of order"]


def test_the_answer_to_a_stop_does_not_undo_the_end_that_an_event_told_first(store):
    """A run that waits ends at once, and its event may come before the answer."""
    state = store(f"""{RUNS}
      runs.watch(() => {{}}); await settle();
      const told = async (state) => {{
        answers["/tdpo/runs/a/stop"] = async () => {{
          api.tell("tdpo.progress", {{ ...S, state, metrics: null }});
          return [200, {{ ...S, state: "stopping" }}];
        }};
        await runs.stop("a");
        return runs.find("a").state;
      }};
      return [await told("running"), await told("stopped")];
    """)
    assert state == ["stopping", "stopped"]


def test_of_a_deleted_run_nothing_is_remembered(store):
    """Another one may take its name."""
    state = store(f"""{RUNS}
      const end = runs.watch(() => runs.load("a")); await settle(); end();
      answers["/tdpo/runs/a"] = () => [409, {{ error: "it is training" }}];
      const error = await runs.remove("a").catch((error) => error.message);
      const kept = runs.metrics("a").length;
      answers["/tdpo/runs/a"] = () => [200, {{ id: "a" }}];
      await runs.remove("a");
      return [error, kept, runs.list, runs.metrics("a"), asked.at(-1)];
    """)
    assert state == ["it is training", 2, [], [], "DELETE /tdpo/runs/a"]


def test_nobody_listens_when_nobody_watches(store):
    state = store(f"""{RUNS}
      const end = runs.watch(() => {{}}); await settle();
      end();
      api.tell("tdpo.progress", {{ ...S, epoch: 5, metrics: null }}); await settle();
      return [runs.find("a").epoch, asked];
    """)
    assert state == [2, ["GET /tdpo/runs"]]


# --- in a real browser -----------------------------------------------------------------------------------------------

RENDERERS = {"LiteGraph": False, "Vue": True}  # the setting Comfy.VueNodes.Enabled
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.ColorPalette": "dark"}
SMALL = {"epochs": 500, "samples_per_epoch": 8, "steps": 3, "settings": "output.grid_images = 4", "batch_size": 2}
PATIENCE = 300_000  # milliseconds, for what takes a few seconds on a quiet machine

READY = (
    "() => !!(window.app?.extensionManager && window.LiteGraph?.registered_node_types?.TDPOTrain && app.canvas?.graph)"
)
LOOK_AT = """async (type) => {
  const { graph, canvas } = window.app;
  const node = graph.nodes.find((node) => node.type === type);
  canvas.ds.scale = 1;
  canvas.ds.offset = [60 - node.pos[0], 100 - node.pos[1]];
  canvas.setDirty(true, true);
}"""
RUN_BUTTON = "button[data-testid=queue-button], [data-testid=queue-button] button"  # around it until 1.28 or later
CHANGE = """(values) => {
  for (const { widgets } of window.app.graph.nodes)
    for (const widget of widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
}"""


def chromium_path() -> str | None:
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if comfyui.MISSING:
        pytest.skip(comfyui.MISSING)
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    path = chromium_path()
    if path is None:
        pytest.skip("no Chromium: install the package 'chromium' of the system, or set CHROMIUM to its path")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


FRONTENDS = {"bundled": (), "newest": ("--front-end-root", str(FRONTEND))}
no_newest = pytest.mark.skipif(not FRONTEND.is_dir(), reason=f"no newest frontend: {FRONTEND} is missing")


def shown_by(frontend: str, renderer: str) -> Any:
    """A parameter: which frontend shows the nodes, and how."""
    marks = [no_newest] if frontend == "newest" else []
    if (frontend, renderer) == ("newest", "LiteGraph"):
        marks.append(pytest.mark.full)  # the other two differ in both
    return pytest.param((frontend, renderer), id=f"{frontend}-{renderer}", marks=marks)


NEWEST = [shown_by("newest", renderer) for renderer in RENDERERS]
BOTH = [shown_by("bundled", "LiteGraph"), shown_by("newest", "Vue")]  # both frontends and both renderers


@pytest.fixture(scope="module")
def servers(browser, tmp_path_factory) -> Iterator[Callable[[str], Server]]:
    """A frontend -> the server with it, one for all tests."""
    started: dict[str, Server] = {}

    def server(frontend: str) -> Server:
        if frontend not in started:
            started[frontend] = Server(tmp_path_factory.mktemp("frontend"), flags=FRONTENDS[frontend])
        return started[frontend]

    yield server
    for server in started.values():
        server.end()


class Tab:
    """A page of the real frontend, and what it complained of that is ours."""

    def __init__(self, browser: Any, server: Server, **settings: Any):
        self.server, self.problems = server, []
        server.post("/settings", SETTINGS | settings)
        self.page = browser.new_page(viewport={"width": 1300, "height": 1150})
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self._complain(f"{error} {error.stack}"))

    def _note(self, message: Any) -> None:
        if message.type in ("warning", "error"):
            self._complain(f"{message.text} {message.location}")

    def _complain(self, text: str) -> None:
        if re.search("tdpo|workflow against|missing", text, re.IGNORECASE):
            self.problems.append(text)

    def open(self) -> None:
        self.page.goto(f"http://127.0.0.1:{self.server.port}")
        self.page.wait_for_function(READY)
        self.page.wait_for_timeout(1000)

    def load(self, graph: dict) -> None:
        self.page.evaluate("async (graph) => { await window.app.loadGraphData(graph); }", graph)
        self.page.wait_for_timeout(500)

    def look_at_train(self) -> None:
        self.page.evaluate(LOOK_AT, "TDPOTrain")
        self.page.wait_for_selector(".tdpo-panel", state="visible")

    @property
    def state(self) -> str:
        return self.page.locator(".tdpo-state").first.text_content()

    def wait_for_state(self, state: str) -> None:
        self.page.wait_for_function(
            "(state) => document.querySelector('.tdpo-state')?.textContent === state", arg=state
        )

    def wait_for_epochs(self, count: int) -> int:
        """How many points the training curve has, once there are so many."""
        points = "document.querySelector('.tdpo-trained .tdpo-curve')?.points.length ?? 0"
        self.page.wait_for_function(f"(count) => ({points}) >= count", arg=count)
        return self.page.evaluate(points)


def screenshot(tab: Tab, name: str) -> None:
    """Kept where $TDPO_SCREENSHOTS says, to be looked at."""
    if folder := os.environ.get("TDPO_SCREENSHOTS"):
        tab.page.screenshot(path=f"{folder}/{name}.png")


@pytest.mark.slow
@pytest.mark.parametrize("shown", NEWEST)
def test_the_curve_moves_comes_back_after_a_reload_and_stops(browser, servers, shown):
    frontend, renderer = shown
    server = servers(frontend)
    tab = Tab(browser, server, **{"Comfy.VueNodes.Enabled": RENDERERS[renderer]})
    page = tab.page
    tab.open()
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("tdpo-under-test", exact=True).first.click()
    page.get_by_test_id("template-workflow-shapes_quickstart").click()
    page.wait_for_function("() => window.app.graph.nodes.some((node) => node.type === 'TDPOTrain')")
    page.wait_for_timeout(1000)
    page.evaluate(CHANGE, SMALL | {"run_name": renderer})
    tab.look_at_train()

    page.locator(RUN_BUTTON).first.click()
    first = tab.wait_for_epochs(2)
    tab.wait_for_epochs(first + 2)
    assert tab.state == "Training"
    assert page.locator(".tdpo-samples img").last.get_attribute("alt").startswith("Sample images ")
    screenshot(tab, f"{frontend}-{renderer}-training")

    page.reload()
    page.wait_for_function(READY)
    page.wait_for_function("() => window.app.graph.nodes.some((node) => node.type === 'TDPOTrain')")
    tab.look_at_train()
    tab.wait_for_epochs(first + 2)
    done = server.status(renderer)["epoch"]
    back = tab.wait_for_epochs(1)
    assert back >= done - 1  # all that were before the reload too; the event of the last may be on its way
    tab.wait_for_epochs(back + 1)

    page.get_by_role("button", name="Stop", exact=True).click()
    tab.wait_for_state("Stopped")
    assert not page.get_by_role("button", name="Stop", exact=True).is_visible()
    assert "Stopped after epoch" in page.locator(".tdpo-message").text_content()
    screenshot(tab, f"{frontend}-{renderer}-stopped")
    assert server.status(renderer)["state"] == "stopped"
    assert tab.problems == []
    page.close()


ADD_TRAIN = """() => {
  const { graph } = window.app;
  const add = (type, x) => {
    const node = Object.assign(window.LiteGraph.createNode(type), { pos: [x, 0] });
    graph.add(node);
    return node;
  };
  const [shapes, reward, train] = [add("TDPOShapesModel", -700), add("TDPORewardModel", -350), add("TDPOTrain", 0)];
  for (const output of [0, 1, 2]) shapes.connect(output, train, output);
  reward.connect(0, train, 3);
}"""
ENDLESS = SMALL | {"reward": "shapes-aesthetic", "mode": "background"}


@pytest.mark.slow
@pytest.mark.parametrize("shown", NEWEST)
def test_runs_wait_in_a_queue_say_so_and_are_stopped_one_by_one(browser, servers, shown):
    """Three of one node: the second is stopped before its turn, the first in its turn, and the third ends by itself."""
    frontend, renderer = shown
    server = servers(frontend)
    tab = Tab(browser, server, **{"Comfy.VueNodes.Enabled": RENDERERS[renderer]})
    page = tab.page
    tab.open()
    tab.load(graph_of())
    page.evaluate(ADD_TRAIN)
    tab.look_at_train()
    first, second, third = names = [f"{number} {renderer}" for number in ("first", "second", "third")]
    for name in names:
        page.evaluate(CHANGE, ENDLESS | {"run_name": name, "epochs": 2 if name == third else 500})
        page.locator(RUN_BUTTON).first.click()
        server.until(name.replace(" ", "%20"), lambda status: status["state"] in ("running", "waiting"))
    page.locator(f".tdpo-run[title='{third}']").wait_for()
    tab.wait_for_state("Waiting to start")
    waits = f"Waits for run '{first}' to end, then starts by itself. Stop takes it out of the queue."
    assert page.locator(".tdpo-message").text_content() == waits

    page.get_by_role("button", name="All runs").click()
    table = page.get_by_role("dialog", name="Runs")
    state = lambda name: table.locator(f"tr:has([aria-label='Tick {name}']) .tdpo-cell-state")  # noqa: E731
    row = lambda name: (state(name).text_content(), state(name).get_attribute("title"))  # noqa: E731
    is_now = lambda name, told: state(name).get_by_text(told, exact=True).wait_for()  # noqa: E731
    stop = table.get_by_role("button", name="Stop", exact=True)
    is_now(first, "Training")
    assert row(second) == row(third) == ("Waiting to start", waits)
    assert stop.is_disabled(), "none is ticked"
    screenshot(tab, f"queue-{renderer}")

    table.get_by_label(f"Tick {second}").check()
    stop.click()
    is_now(second, "Stopped")
    assert (row(first)[0], row(third)) == ("Training", ("Waiting to start", waits))
    assert stop.is_disabled(), "it has ended"
    table.get_by_label(f"Tick {second}").uncheck()
    table.get_by_label(f"Tick {first}").check()
    stop.click()
    is_now(first, "Stopped")
    is_now(third, "Finished")
    table.get_by_role("button", name="Close").click()
    tab.wait_for_state("Finished")
    assert [server.status(name.replace(" ", "%20"))["state"] for name in names] == ["stopped", "stopped", "finished"]
    assert tab.problems == []
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("shown", BOTH)
def test_a_refusal_is_read_in_the_node_until_it_runs(browser, servers, shown):
    frontend, renderer = shown
    tab = Tab(browser, servers(frontend), **{"Comfy.VueNodes.Enabled": RENDERERS[renderer]})
    tab.open()
    tab.load(graph_of())
    tab.page.evaluate(ADD_TRAIN)
    tab.page.evaluate(LOOK_AT, "TDPOTrain")
    named = ENDLESS | {"run_name": f"refused {frontend} {renderer}", "epochs": 1}
    tab.page.evaluate(CHANGE, named | {"settings": "xyzzy = 1"})
    tab.page.locator(RUN_BUTTON).first.click()
    tab.page.locator(".tdpo-failed:visible", has_text="settings: unknown setting 'xyzzy'").wait_for()
    screenshot(tab, f"{frontend}-{renderer}-refused")
    tab.page.keyboard.press("Escape")  # ComfyUI's own dialog
    tab.page.evaluate(CHANGE, named | {"settings": ""})
    tab.page.locator(RUN_BUTTON).first.click()
    tab.wait_for_state("Finished")
    assert tab.page.locator(".tdpo-failed, .tdpo-problem:visible").count() == 0
    tab.page.close()


# What a made-up server tells; a graph with Train nodes alone shows it without a training.
EPOCHS = [
    {"epoch": n, "reward/r/mean": 5 + n / 5, "reward/r/std": 1.0, "eval/gold/mean": 0.7 - n / 50, "eval/judge/mean": 1}
    for n in range(1, 7)
]
WORKFLOW = "11111111-1111-4111-8111-111111111111"
TOLD = {
    "id": "made up", "node": "1", "workflow": WORKFLOW,
    "state": "running", "epoch": 6, "epochs": 10, "phase": "sampling", "phase_done": 48,
    "phase_total": 96, "eta_s": 75.0, "reward": "r", "eval_rewards": ["gold", "judge"], "samples_epoch": None,
    "lora": None, "error": None, "message": "Training.", "grids": [0, 3, 6], "kept": [3, 6], "use": None,
    "strengths": {"6": [0.5, 1.0]}, "grid_shape": [2, 4],
}  # fmt: skip


def row_of_table(run: dict) -> dict:
    """What the table of runs is told beside a run's status; `of_table` in it has what differs."""
    row = {"id": run["id"], "algorithm": "tdpo-g", "watched": "gold", "files": 12, "bytes": 31_400_000}
    return row | {"modified": 1_780_000_000, "metrics": EPOCHS[: run["epoch"]]} | run.get("of_table", {})


TABLES = [
    {
        "title": f"{prompts}: 8 prompts, 4 images each",
        "rows": [
            ["runs", "epoch", "reward queries", "shapes-aesthetic", "<b>gold</b>"],
            ["base", "-", "0", "5.02", "0.648"],
            *(
                ["tdpo-r", str(n), str(96 * n), "6.04 (+1.02 ± 0.15)", "0.586 (-0.062 ± 0.119)"]
                for n in range(3, 16, 3)
            ),
        ],
    }
    for prompts in ("shapes-unseen", "shapes-complex")
]


def train_node(id: int, x: int = 0, **more: Any) -> dict:
    place = {"pos": [x, 0], "size": [600, 960], "flags": {}, "mode": 0, "order": 0, "properties": {}}
    return {"id": id, "type": "TDPOTrain"} | place | more


def graph_of(*nodes: dict) -> dict:
    empty = {"id": WORKFLOW, "version": 0.4, "last_node_id": 99, "last_link_id": 0, "links": [], "groups": []}
    return empty | {"nodes": list(nodes)}


@pytest.fixture(scope="module")
def tabs(browser, servers) -> Iterator[Callable[[str, str], Tab]]:
    """A frontend and how it shows nodes -> its page, one for all tests."""
    opened: dict[tuple[str, str], Tab] = {}

    def tab(frontend: str, renderer: str) -> Tab:
        if (frontend, renderer) not in opened:
            tab = Tab(browser, servers(frontend), **{"Comfy.VueNodes.Enabled": RENDERERS[renderer]})
            tab.open()
            opened[frontend, renderer] = tab
        return opened[frontend, renderer]

    yield tab
    for tab in opened.values():
        tab.page.close()


@pytest.fixture
def shared_tab(tabs, request) -> Tab:
    return tabs(*getattr(request, "param", ("bundled", "LiteGraph")))


# For tests of what a later frontend could change
in_each = pytest.mark.parametrize("shared_tab", [shown_by("bundled", "LiteGraph"), *NEWEST], indirect=True)


@pytest.fixture
def tab(shared_tab) -> Iterator[Tab]:
    """A page whose server knows the runs in `tab.told`, and fails while `tab.down`."""
    shared_tab.problems.clear()
    shared_tab.told, shared_tab.down, shared_tab.asked, shared_tab.epochs = [dict(TOLD)], False, [], EPOCHS
    shared_tab.no_samples, shared_tab.ballot = False, {"pictures": []}

    def answer(route: Any) -> None:
        path = route.request.url.split("/tdpo/")[1]
        shared_tab.asked.append(f"{route.request.method} {path}")
        if shared_tab.down:
            route.abort()
        elif path == "runs":
            route.fulfill(json={"runs": shared_tab.told})
        elif path == "table":
            route.fulfill(json={"rows": [row_of_table(run) for run in shared_tab.told]})
        elif route.request.method == "DELETE":
            delete(route, path)
        elif "metrics" in path:
            route.fulfill(json={"metrics": shared_tab.epochs, "next": 6})
        elif "/samples/" in path and shared_tab.no_samples:
            route.abort()
        elif path.endswith("/evaluation") and "/pictures/" not in path and shared_tab.tables:
            route.fulfill(json={"tables": shared_tab.tables})
        elif "/samples/" in path or "/strengths/" in path or "/pictures/evaluation" in path:
            route.fulfill(body=SQUARE, content_type="image/png")
        elif path.endswith("/ballot"):
            route.fulfill(json=shared_tab.ballot)
        elif path.endswith("/votes"):
            shared_tab.votes.append((path, route.request.post_data_json))
            route.fulfill(json={"name": "mine", "votes": len(shared_tab.votes)})
        elif path.endswith("/stop"):
            route.fulfill(status=400, json={"error": "<b>no</b>"})
        else:
            route.fulfill(status=404, json={"error": "no such picture"})

    def delete(route: Any, path: str) -> None:
        name = unquote(path.removeprefix("runs/"))
        if name in shared_tab.undeletable:
            route.fulfill(status=400, json={"error": f"run '{name}' is in use"})
        else:
            shared_tab.told = [run for run in shared_tab.told if run["id"] != name]
            route.fulfill(json={"id": name})

    shared_tab.page.route("**/tdpo/table", answer)
    shared_tab.page.route("**/tdpo/runs**", answer)
    shared_tab.page.route("**/tdpo/runs/**", answer)
    shared_tab.page.route("**/tdpo/tastes/**", answer)
    shared_tab.votes, shared_tab.undeletable, shared_tab.tables = [], set(), TABLES
    yield shared_tab
    shared_tab.page.evaluate("() => document.querySelectorAll('dialog[open]').forEach((dialog) => dialog.close())")
    shared_tab.load(graph_of())
    shared_tab.page.unroute_all()


def square() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 80, 40)).save(buffer, "png")
    return buffer.getvalue()


SQUARE = square()


def show(tab: Tab, *nodes: dict) -> None:
    tab.load(graph_of(*(nodes or (train_node(1),))))
    tab.look_at_train()


def tell(tab: Tab, **status: Any) -> None:
    """An event of the server's."""
    event = TOLD | {"metrics": None} | status
    tab.page.evaluate("(detail) => window.app.api.dispatchCustomEvent('tdpo.progress', detail)", event)
    tab.page.wait_for_timeout(200)


def evaluate_node(**more: Any) -> dict:
    return train_node(1, type="TDPOEvaluate", size=[600, 700]) | more


@in_each
def test_an_evaluation_is_seen_in_its_node(tab):
    """At once where one was made before, and anew after each run; what is asked in vain says why."""
    tab.tables = []
    tab.load(graph_of(evaluate_node()))
    tab.page.evaluate(LOOK_AT, "TDPOEvaluate")
    panel = tab.page.locator(".tdpo-evaluation")
    panel.wait_for(state="visible")
    assert panel.inner_text() == "Press Run: the rewards of the run's snapshots appear here."
    executed = "() => window.app.graph.nodes[0].onExecuted({ tdpo_evaluation: ['made up'] })"
    tab.page.evaluate(executed)
    tab.page.get_by_text("no such picture").wait_for()
    tab.tables = TABLES
    tab.page.evaluate(executed)
    tab.page.wait_for_selector(".tdpo-table")
    assert tab.page.locator(".tdpo-table").count() == 2
    words = panel.inner_text()
    for text in ("made up", "shapes-unseen: 8 prompts, 4 images each", "6.04 (+1.02 ± 0.15)", "<b>gold</b>"):
        assert text in words
    tab.page.wait_for_function("() => document.querySelector('.tdpo-evaluation img').naturalWidth === 64")
    screenshot(tab, f"evaluation-{tab.page.evaluate('() => window.__COMFYUI_FRONTEND_VERSION__')}")
    saved = json.loads(tab.page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))
    (node,) = saved["nodes"]
    assert node["widgets_values"] == ["auto", 4, "", ""], "the panel is none of them"
    tab.load(saved)
    tab.page.wait_for_selector(".tdpo-table")
    tab.load(graph_of(saved["nodes"][0] | {"id": 2}))
    tab.page.wait_for_timeout(500)
    assert tab.page.locator(".tdpo-table").count() == 0, "a copy has found nothing yet"
    assert [problem for problem in tab.problems if "404" not in problem] == []


def test_before_any_run_there_is_a_quiet_hint(tab):
    tab.told = []
    show(tab)
    assert tab.page.locator(".tdpo-hint").text_content().startswith("Press Run")
    assert not tab.page.locator(".tdpo-body").is_visible()


@in_each
def test_what_is_seen_of_a_run(tab):
    show(tab)
    tab.wait_for_epochs(6)
    texts = tab.page.locator(".tdpo-body").inner_text()
    for text in (
        "Training",
        "made up",
        "Epoch 7 of 10",
        "about 75 s left",
        "Sampling, 48 of 96",
        "6.20 (+1.00 spreads)",
        "held out",
    ):
        assert text in texts
    assert tab.page.locator(".tdpo-curve").count() == 3
    assert tab.page.locator(".tdpo-chart").get_attribute("aria-label").startswith("training reward r: 5.20 in epoch 1")
    bars = tab.page.get_by_role("progressbar").evaluate_all("(bars) => bars.map((bar) => bar.ariaValueNow)")
    assert bars == ["60", "50"]
    assert tab.problems == []


@in_each
def test_each_reward_of_a_sum_has_its_own_curve(tab):
    """In one colour, with its name above it."""
    name = "hpsv2 / 0.011 + 0.5 clipscore / 0.03 + aesthetic"
    parts = {"hpsv2": 0.27, "clipscore": 0.31, "aesthetic": 5.6}
    tab.told[0] |= {"id": "a sum", "reward": name, "eval_rewards": ["gold"]}
    tab.epochs = [
        {"epoch": n, f"reward/{name}/mean": 30 + n, f"reward/{name}/std": 2.0}
        | {f"reward/{part}/{kind}": value * (1 + n / 90) ** (kind == "mean") for part, value in parts.items()
           for kind in ("mean", "std")}
        | {"eval/gold/mean": 0.7 - n / 50}
        for n in range(1, 7)
    ]  # fmt: skip
    show(tab)
    tab.wait_for_epochs(6)
    screenshot(tab, "sum")
    kinds = tab.page.locator(".tdpo-chart g:has(> .tdpo-name)").evaluate_all("(all) => all.map((g) => g.classList[0])")
    assert kinds == ["tdpo-trained", "tdpo-part", "tdpo-part", "tdpo-part", "tdpo-held-out"]
    names = tab.page.locator(".tdpo-part .tdpo-name").evaluate_all("(all) => all.map((e) => e.childNodes[0].data)")
    assert names == list(parts)
    assert tab.page.locator(".tdpo-part .tdpo-curve").count() == 3


def test_the_epochs_that_overoptimise_are_shaded(tab):
    """From the first of them to the right edge, in every chart; the words say so too."""
    tab.told[0] |= {"overoptimised": 4}
    show(tab)
    tab.wait_for_epochs(6)
    shades, curve = tab.page.locator(".tdpo-overoptimised"), tab.page.locator(".tdpo-curve").first
    assert shades.count() == 3
    fourth = curve.get_attribute("points").split(" ")[3].split(",")[0]
    assert shades.first.get_attribute("x") == fourth and float(shades.first.get_attribute("width")) > 50
    label = tab.page.locator(".tdpo-chart").get_attribute("aria-label")
    assert label.endswith("; overoptimisation since epoch 4")
    screenshot(tab, "overoptimised")


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_every_word_can_be_read(tab, palette):
    """WCAG's contrast for text, 4.5, against the panel's own ground."""
    tab.page.evaluate("(name) => window.app.extensionManager.setting.set('Comfy.ColorPalette', name)", palette)
    tab.told[0] |= {"state": "failed", "error": "Something broke."}
    show(tab, train_node(1, properties={"tdpo_run": "1|made up"}))
    tab.page.wait_for_selector(".tdpo-curve", state="attached")
    tab.page.wait_for_timeout(300)
    screenshot(tab, f"failed-{palette}")
    contrasts = tab.page.evaluate("""() => {
      const light = (color) => {
        const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((c) => c / 255).map(
          (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ground = light(getComputedStyle(document.querySelector(".tdpo-panel")).backgroundColor);
      const shown = [...document.querySelectorAll(".tdpo-panel *")].filter((e) => e.getClientRects().length);
      const hasWords = (element) => [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
      const words = shown.filter((element) => hasWords(element) && element.localName !== "title");
      return words.map((element) => {
        const style = getComputedStyle(element);
        const ink = light(element instanceof SVGElement ? style.fill : style.color);
        return [element.textContent, (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05)];
      });
    }""")
    assert len(contrasts) > 10
    assert {text: ratio for text, ratio in contrasts if ratio < 4.5} == {}


# Epochs with numbers that are near zero, near one another, and between two round ones.
AWKWARD = [
    {
        "epoch": n,
        "reward/r/mean": 3.05 + n / 2000,
        "reward/r/std": 0.0003,
        "eval/gold/mean": -0.004 - n * 1e-5,
        "eval/judge/mean": 3.3 + n / 2.5,
    }
    for n in range(1, 7)
]


@pytest.mark.parametrize(
    ("name", "height", "epochs"), [("large", 1100, EPOCHS), ("small", 100, EPOCHS), ("awkward", 100, AWKWARD)]
)
def test_nothing_is_cut_off_or_overlaps(tab, name, height, epochs):
    """In the smallest node, the axes have their least height."""
    tab.told[0] |= {"id": name}  # the page remembers the epochs of a run
    tab.epochs = epochs
    for width in (320, 420, 640, 900):
        show(tab, train_node(1, size=[width, height]))
        tab.wait_for_epochs(6)
        tab.page.wait_for_timeout(300)
        screenshot(tab, f"{name}-{width}")
        found = tab.page.evaluate("""() => {
          const panel = document.querySelector(".tdpo-panel").getBoundingClientRect();
          const elements = [...document.querySelectorAll(".tdpo-chart text")];
          const texts = elements.map((e) => ({ t: e.textContent, b: e.getBoundingClientRect() }));
          const chart = document.querySelector(".tdpo-chart").getBoundingClientRect();
          const out = texts.filter(({ b }) => b.left < chart.left || b.right > panel.right || b.bottom > panel.bottom);
          const over = texts.filter(({ b }, i) => texts.slice(0, i).some(({ b: o }) =>
            b.left < o.right && o.left < b.right && b.top + 3 < o.bottom && o.top + 3 < b.bottom));
          return [...out, ...over].map(({ t }) => t);
        }""")
        assert found == [], f"{width} pixels: {found}"


def samples_shown(tab: Tab) -> list[str]:
    return tab.page.locator(".tdpo-samples:not([hidden]) img").evaluate_all("(images) => images.map((i) => i.alt)")


def test_the_epoch_under_the_pointer_is_seen_beside_the_first_and_a_click_holds_it(tab):
    show(tab)
    tab.wait_for_epochs(6)
    tab.page.wait_for_function("() => document.querySelectorAll('.tdpo-samples:not([hidden])').length === 2")
    before = "Sample images before training"
    assert samples_shown(tab) == [before, "Sample images after epoch 6"]
    chart = tab.page.locator(".tdpo-chart")
    box = chart.bounding_box()
    fourth = {"x": 40 + (box["width"] - 50) * 3 / 9, "y": box["height"] / 3}
    chart.hover(position=fourth)
    assert samples_shown(tab) == [before, "Sample images after epoch 3"], "the newest that was drawn by then"
    tab.page.mouse.move(5, 5)
    assert samples_shown(tab)[1] == "Sample images after epoch 6"
    assert not tab.page.get_by_role("button", name="Use epoch").is_visible()
    third = fourth | {"x": 40 + (box["width"] - 50) * 2 / 9}
    chart.click(position=third)
    tab.page.mouse.move(5, 5)
    assert samples_shown(tab)[1] == "Sample images after epoch 3"
    screenshot(tab, "picked")
    assert tab.page.get_by_role("button", name="Use epoch 3").is_visible()
    chart.click(position=third)
    tab.page.mouse.move(5, 5)
    assert samples_shown(tab)[1] == "Sample images after epoch 6"


def apply_node() -> dict:
    return train_node(9, 700) | {"type": "TDPOApplyLoRA", "size": [300, 200], "widgets_values": [0.5, "latest", 1]}


def apply_values(tab: Tab) -> list:
    names = ["snapshot", "epoch", "strength"]
    return tab.page.evaluate(
        """(names) => {
          const node = window.app.graph.nodes.find((node) => node.type === "TDPOApplyLoRA");
          return names.map((name) => node.widgets.find((widget) => widget.name === name).value);
        }""",
        names,
    )


def test_samples_that_failed_to_load_are_requested_again(tab):
    """Also of a run that has ended, of which no event tells."""
    tab.no_samples, tab.told = True, [TOLD | {"state": "stopped"}]
    show(tab)
    failed = "(image) => image.src && image.complete && image.closest('.tdpo-samples').hidden"
    tab.page.wait_for_function(f"() => [...document.querySelectorAll('.tdpo-samples img')].every({failed})")
    tab.no_samples = False
    tab.page.wait_for_function("() => document.querySelectorAll('.tdpo-samples:not([hidden])').length === 2")
    assert [path for path in tab.asked if "/samples/" in path] == 2 * [
        f"GET runs/made%20up/samples/{epoch}" for epoch in (0, 6)
    ]


def test_one_click_takes_the_recommended_lora_or_an_epoch_over(tab):
    label = "Use the recommended LoRA: epoch 9, strength 0.75"
    tab.told[0] |= {"state": "finished", "use": {"snapshot": "recommended", "epoch": 9, "label": label}}
    train = train_node(1, properties={"tdpo_run": "1|made up"})
    show(tab, train)
    tab.wait_for_epochs(6)
    button = tab.page.get_by_role("button", name=label)
    button.click()
    assert "There is no TDPO LoRA Apply node" in tab.page.locator(".tdpo-message").text_content()
    apply = {
        "id": 9,
        "type": "TDPOApplyLoRA",
        "pos": [700, 0],
        "size": [300, 200],
        "widgets_values": [0.5, "latest", 1],
    }
    show(tab, train, apply)
    tab.wait_for_epochs(6)
    button.click()
    assert apply_values(tab) == ["recommended", 9, 1]
    said = "TDPO LoRA Apply now takes the recommended LoRA, strength 1. Press Run to see it."
    assert tab.page.locator(".tdpo-message").text_content() == said


@in_each
def test_before_and_after_are_compared_at_any_strength(tab):
    show(tab, train_node(1), apply_node())
    tab.wait_for_epochs(6)
    tab.page.get_by_role("button", name="Compare").click()
    dialog = tab.page.locator(".tdpo-comparison")
    sources = lambda: dialog.locator("img").evaluate_all("(all) => all.map((i) => i.src.split('/tdpo/runs/')[1])")  # noqa: E731
    assert sources() == ["made%20up/samples/0", "made%20up/samples/6"]
    assert int(dialog.get_by_label("Divider").input_value()) % 25 > 5, "not on a gap between images"
    assert "Drag the line" in dialog.inner_text()
    dialog.get_by_label("Divider").fill("20")
    clips = dialog.locator("img").evaluate_all("(all) => all.map((image) => getComputedStyle(image).clipPath)")
    assert ["80%" in clips[0], "20%" in clips[1]] == [True, True], clips
    dialog.get_by_label("Epoch").select_option("3")
    assert sources() == ["made%20up/samples/0", "made%20up/samples/3"]
    dialog.get_by_label("Epoch").select_option("6")
    dialog.get_by_label("Strength").select_option("0.5")
    assert sources() == ["made%20up/strengths/0/0", "made%20up/strengths/6/0.5"]
    screenshot(tab, "comparison")
    dialog.get_by_role("button", name="Use epoch 6, strength 0.5").click()
    assert apply_values(tab) == ["epoch", 6, 0.5]
    dialog.wait_for(state="detached")


@in_each
def test_images_are_voted_on_with_a_click(tab):
    show(tab)
    tab.wait_for_epochs(6)
    tab.page.get_by_role("button", name="Compare").click()
    dialog = tab.page.locator(".tdpo-comparison")
    dialog.get_by_label("Name of the taste").fill("mine")
    stage = dialog.locator(".tdpo-stage")
    box = stage.bounding_box()
    stage.click(position={"x": box["width"] * 0.9, "y": box["height"] * 0.9})
    assert tab.votes == [], "the divider moves"
    dialog.get_by_label("Divider").fill("50")
    dialog.get_by_role("button", name="Like", exact=False).first.click()
    stage.click(position={"x": box["width"] * 0.9, "y": box["height"] * 0.9})
    dialog.get_by_role("button", name="Dislike").click()
    stage.click(position={"x": box["width"] * 0.1, "y": box["height"] * 0.2})
    tab.page.wait_for_function("() => document.querySelectorAll('.tdpo-marks span').length === 2")
    assert tab.votes == [
        ("tastes/mine/votes", {"picture": {"run": "made up", "epoch": 6, "row": 1, "col": 3}, "liked": True}),
        ("tastes/mine/votes", {"picture": {"run": "made up", "epoch": 0, "row": 0, "col": 0}, "liked": False}),
    ]
    assert dialog.locator(".tdpo-marks span").all_text_contents() == ["♥", "✕"]
    assert "2 votes in taste mine" in dialog.inner_text()
    assert stage.bounding_box() == box, "the next click hits what it is aimed at"
    screenshot(tab, "votes")
    dialog.get_by_label("Strength").select_option("0.5")
    assert dialog.get_by_role("button", name="Dislike").is_disabled(), "those are no images of a grid"
    dialog.get_by_role("button", name="Close").click()


# Six runs, as an artist may have them; the page remembers the epochs of those that it knows by name.
def lower(by: float, **more: Any) -> dict:
    rows = [line | {"reward/r/mean": line["reward/r/mean"] - by * line["epoch"]} for line in EPOCHS]
    return {"metrics": rows} | more


ENDED = TOLD | {"node": None, "state": "finished", "epoch": 6, "epochs": 6, "message": "Finished."}
SEVERAL = [
    TOLD | {"id": "watercolours 3", "state": "running", "of_table": {"bytes": 412_000_000, "files": 61}},
    TOLD | {"id": "ink", "state": "waiting", "epoch": 0, "node": None, "of_table": {"watched": None}},
    ENDED | {"id": "watercolours 2", "overoptimised": 4, "of_table": lower(0.05, bytes=1_240_000_000, files=214)},
    ENDED | {"id": "watercolours", "of_table": lower(0.1, bytes=980_000_000, files=208)},
    ENDED | {"id": "portraits with a name that is as long as a name of a run may be, or nearly so",
             "state": "stopped", "epoch": 4, "epochs": 300, "reward": "hpsv2 / 0.011 + 0.5 clipscore / 0.03"},
    ENDED | {"id": "broken", "state": "failed", "epoch": 0, "epochs": 0, "reward": "", "error": "It is damaged.",
             "of_table": {"algorithm": "", "watched": None, "metrics": []}},
]  # fmt: skip


def open_table(tab: Tab) -> Any:
    tab.told = [dict(run) for run in SEVERAL]
    show(tab)
    tab.page.get_by_role("button", name="All runs").click()
    table = tab.page.get_by_role("dialog", name="Runs")
    table.get_by_text("1.2 GB").wait_for()
    return table


def lines_of(table: Any) -> int:
    return table.locator(".tdpo-chart .tdpo-trained .tdpo-curve").count()


@in_each
def test_the_table_lists_all_runs_and_overlays_those_that_are_ticked(tab):
    tab.page.set_viewport_size({"width": 1366, "height": 768})
    table = open_table(tab)
    rows = table.locator("tbody tr")
    assert rows.count() == len(SEVERAL)
    cells = rows.nth(2).locator("td").all_inner_texts()
    assert cells[1:6] == ["watercolours 2", "Finished", "tdpo-g", "r", "6 of 6"]
    assert cells[7:10] == ["+0.75 spreads", "\N{MINUS SIGN}0.10⚠ since 4", "1.2 GB"]
    assert [rows.nth(i).locator(".tdpo-sparkline polyline").count() for i in range(6)] == [2, 0, 2, 2, 2, 0]
    assert rows.nth(5).get_by_text("Failed").get_attribute("title") == "It is damaged."
    screenshot(tab, "table")
    assert not table.locator(".tdpo-chart").is_visible()
    table.get_by_label("Tick watercolours", exact=True).check()
    table.get_by_label("Tick watercolours 2").check()
    assert lines_of(table) == 2
    colors = table.locator(".tdpo-chart .tdpo-trained .tdpo-curve").evaluate_all(
        "(lines) => lines.map((line) => getComputedStyle(line).stroke)"
    )
    assert len(set(colors)) == 2
    assert table.locator(".tdpo-legend").inner_text().split("\n") == ["watercolours 2", "watercolours"]
    screenshot(tab, "table-overlay")
    tell(tab, id="watercolours 3", epoch=7, metrics=EPOCHS[0] | {"epoch": 7, "reward/r/mean": 7})
    assert rows.first.locator("td").nth(5).inner_text() == "7 of 10" and "+1.80 spreads" in rows.first.inner_text()
    table.get_by_label("Tick all runs").check()
    assert lines_of(table) == 4 and "6 runs, " in table.inner_text()
    screenshot(tab, "table-all")
    inside = table.evaluate("""(table) => {
      const { right, bottom } = table.getBoundingClientRect();
      const rows = table.querySelector(".tdpo-rows");
      return [right <= innerWidth, bottom <= innerHeight, rows.scrollWidth <= rows.clientWidth];
    }""")
    assert inside == [True, True, True]
    table.get_by_role("button", name="Close").click()
    table.wait_for(state="detached")
    tab.page.set_viewport_size({"width": 1300, "height": 1150})
    assert tab.problems == []


@in_each
def test_ticked_runs_are_deleted_once_that_is_confirmed(tab):
    table = open_table(tab)
    button = table.get_by_role("button", name="Delete…")
    assert button.is_disabled()
    for name in ("watercolours", "watercolours 2"):
        table.get_by_label(f"Tick {name}", exact=True).check()
    button.click()
    asked = table.locator(".tdpo-asking")
    question = asked.inner_text()
    for text in ("Delete 2 runs, 2.2 GB, with", "watercolours 2 (1.2 GB, 214 files)", "cannot be undone", "stay in"):
        assert text in question
    screenshot(tab, "table-delete")
    asked.get_by_role("button", name="Keep").click()
    assert not asked.is_visible() and not any("DELETE" in line for line in tab.asked)
    tab.undeletable.add("watercolours")
    button.click()
    asked.get_by_role("button", name="Delete").click()
    table.get_by_text("run 'watercolours' is in use").wait_for()
    assert [line for line in tab.asked if "DELETE" in line] == [
        "DELETE runs/watercolours%202",
        "DELETE runs/watercolours",
    ]
    assert table.locator("tbody tr").count() == 5
    assert table.get_by_label("Tick watercolours", exact=True).is_checked()
    table.get_by_role("button", name="Close").click()


def test_a_run_that_trains_is_not_even_asked_about(tab):
    table = open_table(tab)
    table.get_by_label("Tick watercolours 3").check()
    table.get_by_label("Tick ink").check()
    table.get_by_role("button", name="Delete…").click()
    said = table.locator(".tdpo-problem").inner_text()
    assert said == "Still training or waiting: watercolours 3, ink. Stop or untick these first."
    assert not table.locator(".tdpo-asking").is_visible()
    table.get_by_role("button", name="Close").click()


@in_each
def test_the_menu_has_an_entry_for_the_table(tab):
    """Its place is the frontend's own matter; each knows a menu with commands of extensions."""
    tab.told = [dict(run) for run in SEVERAL]
    tab.load(graph_of())
    tab.page.locator("[data-testid=comfy-menu-button], .comfyui-logo-wrapper").first.click()
    tab.page.get_by_role("menuitem", name="TDPO").first.hover()
    screenshot(tab, "menu")
    tab.page.get_by_text("TDPO: All runs").first.click()
    table = tab.page.get_by_role("dialog", name="Runs")
    table.get_by_label("Tick ink").wait_for()
    table.get_by_role("button", name="Close").click()
    table.wait_for(state="detached")


def test_a_table_without_runs_says_so(tab):
    tab.told = []
    show(tab)
    tab.page.get_by_role("button", name="All runs").click()
    table = tab.page.get_by_role("dialog", name="Runs")
    table.get_by_text("There are no runs yet").wait_for()
    tab.page.keyboard.press("Escape")


BALLOT = {
    "name": "my own", "votes": 1, "liked": 1, "disliked": 0, "pairs": 0, "needed": 3,
    "pictures": [{"file": f"{i}.png", "liked": 1 if i == 0 else None} for i in range(4)],
}  # fmt: skip
TELL_BALLOT = "(told) => window.app.graph.nodes.find((node) => node.type === 'TDPOTaste').onExecuted(told)"


@in_each
def test_pictures_are_shown_in_the_taste_and_each_click_is_a_vote(tab):
    taste = train_node(1) | {"type": "TDPOTaste", "pos": [100, 100], "size": [460, 544]}
    tab.load(graph_of(taste))
    tab.page.evaluate(LOOK_AT, "TDPOTaste")
    panel = tab.page.locator(".tdpo-votes")
    panel.wait_for(state="visible")
    assert "Press Run: the connected pictures appear here" in panel.inner_text()
    tab.page.route("**/view?**", lambda route: route.fulfill(body=SQUARE, content_type="image/png"))
    tab.page.evaluate(TELL_BALLOT, {"tdpo_ballot": [BALLOT]})
    pictures = panel.locator(".tdpo-picture")
    assert pictures.count() == 4
    assert "1 vote so far" in panel.inner_text() and "Training starts with 3 votes of both kinds." in panel.inner_text()
    told = [{"votes": 2, "liked": 2}, {"votes": 2, "liked": 1, "disliked": 1}, {"votes": 4, "liked": 1, "disliked": 3}]

    def answer(route: Any) -> None:
        tab.votes.append((route.request.url.split("/tdpo/")[1], route.request.post_data_json))
        route.fulfill(json=told[min(len(tab.votes), 3) - 1])

    tab.page.route("**/tdpo/tastes/**", answer)
    pictures.nth(2).click()
    tab.page.wait_for_selector(".tdpo-picture:nth-child(3)[data-vote=liked]")
    panel.get_by_role("button", name="Dislike", exact=False).first.click()
    pictures.nth(2).click()
    tab.page.wait_for_selector(".tdpo-picture:nth-child(3)[data-vote=disliked]")
    assert "3 are needed before training starts" in panel.inner_text()
    panel.get_by_role("button", name="Dislike the rest").click()
    tab.page.wait_for_selector(".tdpo-picture:nth-child(4)[data-vote=disliked]")
    shown = lambda i, liked: ("tastes/my%20own/votes", {"picture": {"shown": f"{i}.png"}, "liked": liked})  # noqa: E731
    assert tab.votes == [shown(2, True), shown(2, False), shown(1, False), shown(3, False)]
    assert not panel.get_by_role("button", name="Dislike the rest").is_visible()
    assert "Press Run to train on them." in panel.inner_text()
    screenshot(tab, "ballot")
    assert pictures.nth(0).locator("img").get_attribute("alt") == "Picture 1, liked"
    assert tab.problems == []


@in_each
def test_many_pictures_of_a_taste_scroll_inside_the_node(tab):
    taste = train_node(1) | {"type": "TDPOTaste", "pos": [100, 100], "size": [460, 544]}
    tab.load(graph_of(taste))
    tab.page.evaluate(LOOK_AT, "TDPOTaste")
    tab.page.route("**/view?**", lambda route: route.fulfill(body=SQUARE, content_type="image/png"))
    many = [{"file": f"{i}.png", "liked": None} for i in range(64)]
    tab.page.evaluate(TELL_BALLOT, {"tdpo_ballot": [BALLOT | {"pictures": many}]})
    tab.page.wait_for_function("() => document.querySelectorAll('.tdpo-picture').length === 64")
    tab.page.wait_for_timeout(500)
    screenshot(tab, "ballot of many")
    panel, ballot = tab.page.locator(".tdpo-votes"), tab.page.locator(".tdpo-ballot")
    node = tab.page.evaluate("() => { const { pos, size } = app.graph.nodes[0]; return pos[1] + size[1]; }")
    at = tab.page.evaluate("() => app.canvas.canvas.getBoundingClientRect().y + app.canvas.ds.offset[1]")
    box = panel.bounding_box()
    assert box["y"] + box["height"] <= node + at + 1, "below the node are others"
    assert ballot.evaluate("(all) => all.scrollHeight > all.clientHeight && getComputedStyle(all).overflowY === 'auto'")


@in_each
def test_the_pictures_of_a_taste_are_back_at_once_after_a_reload(tab):
    """With their votes, and as the server has them: the page that told of them may have been another. A node of the
    same taste without pictures shows none."""
    other = train_node(1, 600) | {"type": "TDPOTaste", "size": [460, 544], "widgets_values": ["my own"]}
    taste = other | {"id": 2, "pos": [0, 0], "inputs": [{"name": "pictures", "type": "IMAGE", "link": 1}]}
    source = train_node(3, 1200) | {"type": "EmptyImage", "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}]}
    tab.load(graph_of(taste, other, source) | {"last_link_id": 1, "links": [[1, 3, 0, 2, 0, "IMAGE"]]})
    tab.page.evaluate(LOOK_AT, "TDPOTaste")
    tab.page.wait_for_selector(".tdpo-votes .tdpo-hint", state="visible")
    tab.page.wait_for_timeout(1000)  # until the page has noted its graph
    tab.page.route("**/view?**", lambda route: route.fulfill(body=SQUARE, content_type="image/png"))
    tab.ballot, tab.asked = BALLOT, []
    tab.page.reload()
    tab.page.wait_for_function(READY)
    tab.page.wait_for_function("() => window.app.graph.nodes.some((node) => node.type === 'TDPOTaste')")
    tab.page.evaluate(LOOK_AT, "TDPOTaste")
    tab.page.wait_for_selector(".tdpo-picture[data-vote=liked]", state="visible")
    assert tab.page.locator(".tdpo-picture").count() == 4
    assert "1 vote so far" in tab.page.locator(".tdpo-votes", has=tab.page.locator(".tdpo-picture")).inner_text()
    assert tab.asked.count("GET tastes/my%20own/ballot") == 1 and tab.problems == []


def test_words_from_the_server_are_never_html(tab):
    evil = "<img src=x onerror='window.evil = 1'>"
    words = dict.fromkeys(("id", "phase", "reward", "message", "error"), evil)
    tab.told = [TOLD | {"node": "5", "state": "failed"} | words]
    show(tab, train_node(5, properties={"tdpo_run": f"5|{evil}"}))
    tab.page.wait_for_timeout(500)
    assert tab.page.locator(".tdpo-message").text_content() == evil
    assert tab.page.locator(".tdpo-panel img").count() == 2  # those of the samples
    assert tab.page.evaluate("() => window.evil") is None


def test_each_node_shows_its_own_run_and_a_copy_none(tab):
    tab.told = [TOLD | {"id": "b", "node": "2", "state": "finished"}, TOLD | {"id": "a"}]
    second = train_node(2, 650, properties={"tdpo_run": "2|b"})
    show(tab, train_node(1), second, train_node(3, 1300, properties={"tdpo_run": "1|a"}))
    names = tab.page.locator(".tdpo-panel").evaluate_all(
        "(panels) => panels.map((p) => p.querySelector('.tdpo-body').hidden ? '' : p.querySelector('.tdpo-run').title)"
    )
    assert sorted(names) == ["", "a", "b"]


WIRE = """() => {
  const { graph } = window.app;
  const source = window.LiteGraph.createNode("PrimitiveString");
  graph.add(source);
  const train = graph.nodes.find((node) => node.type === "TDPOTrain");
  source.connect(0, train, train.inputs.findIndex((input) => input.name === "run_name"));
}"""


@in_each
def test_a_name_on_a_wire_is_not_the_one_in_the_widget(tab):
    """A finished run of another name than the widget's is not shown, unless a wire decides about the name."""
    finished = {"id": "wired", "node": "7", "state": "finished"}
    tab.told = [TOLD | finished]
    show(tab, train_node(7))
    assert tab.page.locator(".tdpo-hint").is_visible()
    tab.page.evaluate(WIRE)
    tell(tab, **finished)
    assert tab.page.locator(".tdpo-run").get_attribute("title") == "wired"


CHOOSE = """(algorithm) => {
  const widget = window.app.graph.nodes[0].widgets.find(({ name }) => name === "algorithm");
  widget.value = algorithm;
  widget.callback(algorithm);
}"""
WIRE_CRITIC = """() => {
  const { graph } = window.app;
  const critic = window.LiteGraph.createNode("TDPOTemporalCritic");
  critic.pos = [650, 0];
  graph.add(critic);
  const [train] = graph.nodes;
  critic.connect(0, train, train.inputs.findIndex((input) => input.name === "critic"));
}"""


def wait_for_text(locator: Any, text: str) -> None:
    locator.filter(has_text=re.compile(f"^{re.escape(text)}$")).wait_for(state="attached")


@in_each
def test_the_node_says_what_its_algorithm_does_not_use(tab):
    """As soon as an algorithm is chosen, a critic connected or a setting written; what would be refused is marked."""
    tab.told = []
    show(tab)
    said = tab.page.locator(".tdpo-unused")
    assert said.text_content() == ""
    tab.page.evaluate(WIRE_CRITIC)
    wait_for_text(said, "ddpo-g uses no critic: disconnect it, or the run is refused.")
    tab.page.evaluate(CHOOSE, "tdpo-g")
    wait_for_text(said, "tdpo-g resets no neurons, so the reset settings of TDPO Temporal Critic have no effect.")
    assert not re.search("tdpo-problem", said.get_attribute("class"))
    tab.page.evaluate(CHOOSE, "tdpo-r")
    wait_for_text(said, "")
    tab.page.evaluate(CHOOSE, "alignprop")
    wait_for_text(said, "alignprop uses no critic: disconnect it, or the run is refused.")
    assert re.search("tdpo-problem", said.get_attribute("class"))
    assert said.bounding_box()["height"] < 30, "one line"
    screenshot(tab, f"unused-{tab.page.evaluate('() => window.__COMFYUI_FRONTEND_VERSION__ + LiteGraph.vueNodesMode')}")
    tab.page.evaluate("() => window.app.graph.remove(window.app.graph.nodes[1])")
    wait_for_text(said, "")
    tab.page.locator("textarea").last.fill("kl.target = 1\nloss_weight = 2")
    foreign = "In settings, remove what is for other algorithms: kl.target."
    wait_for_text(said, foreign)
    saved = json.loads(tab.page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))
    assert len(saved["nodes"][0]["widgets_values"]) == 16
    tab.load(saved)
    wait_for_text(tab.page.locator(".tdpo-unused"), foreign)
    assert tab.problems == []


SPY = """() => {
  const { graph } = window.app;
  const slot = Object.getPrototypeOf(graph.nodes[0].inputs[0]);
  const link = Object.getOwnPropertyDescriptor(slot, "link");
  window.readers = [];
  const get = function () { window.readers.push(new Error().stack); return link.get.call(this); };
  Object.defineProperty(slot, "link", { ...link, get });
  graph.nodes[0].inputs[0].link;
}"""


@pytest.mark.parametrize("shared_tab", NEWEST, indirect=True)
def test_the_pack_reads_nothing_that_is_deprecated(tab):
    """The frontend warns once a page, whoever is the first to read it, and does so itself: so each reader is noted."""
    show(tab)
    tab.page.evaluate(SPY)
    show(tab)
    tell(tab, epoch=7)
    readers = tab.page.evaluate("() => window.readers")
    assert readers and [stack for stack in readers if "tdpo" in stack] == []


@in_each
def test_what_a_node_shows_is_not_part_of_prompt_or_workflow(tab):
    show(tab)
    inputs = tab.page.evaluate("async () => Object.keys((await window.app.graphToPrompt()).output[1].inputs)")
    values = tab.page.evaluate("() => window.app.graph.serialize().nodes[0].widgets_values")
    assert "tdpo_live" not in inputs and "run_name" in inputs
    assert len(values) == 16  # the fifteen widgets of the schema, and ComfyUI's own behind the seed
    assert values[12] == "fixed"
    assert tab.problems == []


@in_each
def test_a_node_in_a_subgraph_shows_its_run(tab):
    tab.told[0] |= {"node": "12:3"}
    show(tab, train_node(3), train_node(4, 650))
    tab.page.evaluate("""() => {
      const { canvas, graph } = window.app;
      canvas.selectItems([graph.nodes[0]]);
      const { node, subgraph } = graph.convertToSubgraph(canvas.selectedItems);
      window.told = `${node.id}:${subgraph.nodes[0].id}`;
      canvas.setGraph ? canvas.setGraph(subgraph) : canvas.openSubgraph(subgraph);
    }""")
    tell(tab, node=tab.page.evaluate("() => window.told"), id="inside", epoch=0)
    tab.page.wait_for_function(
        "() => [...document.querySelectorAll('.tdpo-run')].some((name) => name.title === 'inside')"
    )
    tab.page.evaluate("() => window.app.canvas.setGraph(window.app.graph.rootGraph ?? window.app.graph)")


@in_each
def test_events_move_it_and_a_removed_node_no_longer_listens(tab):
    show(tab)
    tab.wait_for_epochs(6)
    tell(tab, epoch=7, metrics=EPOCHS[0] | {"epoch": 7})
    assert tab.wait_for_epochs(7) == 7
    tell(tab, state="stopping")
    assert tab.state == "Stopping and saving…"
    assert tab.page.get_by_role("button", name="Stop", exact=True).is_disabled()
    tab.page.evaluate("() => window.app.graph.remove(window.app.graph.nodes[0])")
    asked = len(tab.asked)
    tell(tab, epoch=9)
    tab.page.evaluate("() => window.app.api.dispatchCustomEvent('reconnected')")
    tab.page.wait_for_timeout(300)
    assert len(tab.asked) == asked


def test_a_stop_that_fails_says_why_and_can_be_tried_again(tab):
    show(tab)
    button = tab.page.get_by_role("button", name="Stop", exact=True)
    button.click()
    tab.page.wait_for_selector(".tdpo-problem", state="visible")
    assert tab.page.locator(".tdpo-problem").text_content() == "The run could not be stopped: <b>no</b>"
    assert button.is_enabled() and tab.state == "Training"


def test_a_server_that_went_away_is_told_and_one_that_is_back_is_asked(tab):
    show(tab)
    tab.wait_for_epochs(6)
    tab.down = True
    tab.page.evaluate("() => window.app.api.dispatchCustomEvent('reconnected')")
    tab.page.wait_for_selector(".tdpo-problem", state="visible")
    tab.down, tab.told = False, [TOLD | {"state": "interrupted"}]
    tab.page.evaluate("() => window.app.api.dispatchCustomEvent('reconnected')")
    tab.wait_for_state("Interrupted")
    assert not tab.page.locator(".tdpo-problem").is_visible()


@in_each
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "workflows").glob("*.json")))
def test_a_workflow_opens_without_a_complaint_and_is_saved_as_it_was(shared_tab, name):
    shared_tab.problems.clear()
    before = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    shared_tab.load(before)
    shared_tab.page.wait_for_timeout(500)
    after = json.loads(shared_tab.page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))
    dialogs = shared_tab.page.get_by_role("dialog")
    if name.startswith("sd15") and dialogs.count():  # how the bundled frontend tells of a missing model
        assert "v1-5-pruned-emaonly-fp16.safetensors" in dialogs.inner_text()
        shared_tab.page.keyboard.press("Escape")
        dialogs.wait_for(state="detached")
    assert dialogs.count() == 0
    assert after["links"] == before["links"]
    for new, old in zip(after["nodes"], before["nodes"], strict=True):
        assert not new.get("has_errors")
        for key in ("id", "type", "pos", "title"):
            assert new.get(key) == old.get(key), (old["type"], key)
        assert new["size"][0] == old["size"][0] and new["size"][1] >= old["size"][1], "some renderers need more height"
        assert (new.get("widgets_values") or []) == (old.get("widgets_values") or []), old["type"]
    screenshot(shared_tab, f"workflow-{name}")
    assert shared_tab.problems == []


# Workflows of version 0.1.0, without their notes and groups
OLD = ROOT / "tests" / "golden" / "workflows-0.1.0"
old_workflows = pytest.mark.parametrize("name", sorted(path.stem for path in OLD.glob("*.json")))
VALUES = """() => Object.fromEntries(window.app.graph.nodes.map(({ id, widgets }) =>
  [id, Object.fromEntries((widgets ?? []).map(({ name, value }) => [name, value]))]))"""


def load_old(tab: Tab, name: str) -> dict:
    workflow = json.loads((OLD / f"{name}.json").read_text(encoding="utf-8"))
    tab.load(workflow)
    return workflow


def saved_values(node: dict) -> dict:
    """The values of a saved node by the names of its widgets; the frontend puts a choice of its own behind a seed."""
    names = [socket["name"] for socket in node["inputs"] if "widget" in socket]
    names = [name for known in names for name in ((known, "control_after_generate") if known == "seed" else (known,))]
    return dict(zip(names, node.get("widgets_values", []), strict=True))


@in_each
@old_workflows
def test_a_workflow_of_version_0_1_0_opens_with_its_values_and_wires(shared_tab, name):
    shared_tab.problems.clear()
    workflow = load_old(shared_tab, name)
    values = shared_tab.page.evaluate(VALUES)
    nodes = [node for node in workflow["nodes"] if node["type"].startswith("TDPO")]
    assert len(nodes) >= 5
    for node in nodes:
        saved = saved_values(node)
        assert saved.items() <= values[str(node["id"])].items(), node["type"]
    after = json.loads(shared_tab.page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))
    assert sorted(after["links"]) == sorted(workflow["links"])
    assert shared_tab.problems == []


@pytest.mark.slow
@old_workflows
def test_a_workflow_of_version_0_1_0_runs(shared_tab, name):
    """With little to train and to draw."""
    workflow = load_old(shared_tab, name)
    shared_tab.page.evaluate(CHANGE, {"epochs": 1, "samples_per_epoch": 4, "steps": 3, "batch_size": 1})
    prompt = shared_tab.page.evaluate("async () => (await window.app.graphToPrompt()).output")
    (train,) = (node for node in workflow["nodes"] if node["type"] == "TDPOTrain")
    assert shared_tab.server.run(prompt)[str(train["id"])] == {"tdpo_run": [saved_values(train)["run_name"]]}


# As a template is opened; newer frontends then fit all nodes into three quarters of the window.
OPEN = "async (graph) => { await window.app.loadGraphData(graph, true, true, null, { openSource: 'template' }); }"
# Of the boxes of all nodes, as the renderer at hand shows them, in units of the graph: which overlap, and which are
# outside of every group; which groups overlap; the words that nodes cut off, but for names of files; and the scale.
FOUND = """() => {
  const { graph, canvas } = window.app;
  const { scale, offset } = canvas.ds;
  const { left: x, top: y } = canvas.canvas.getBoundingClientRect();
  const box = (node) => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`);
    if (!element) return [...node.boundingRect];
    const { left, top, width, height } = element.getBoundingClientRect();
    return [(left - x) / scale - offset[0], (top - y) / scale - offset[1], width / scale, height / scale];
  };
  const nodes = graph.nodes.map((node) => ({ title: node.title, b: box(node) }));
  const groups = graph.groups.map(({ title, pos, size }) => ({ title, b: [...pos, ...size] }));
  const apart = (a, b) => a[0] + a[2] <= b[0] || b[0] + b[2] <= a[0] || a[1] + a[3] <= b[1] || b[1] + b[3] <= a[1];
  const holds = (a, b) => [0, 1].every((i) => a[i] <= b[i] + 1 && b[i] + b[i + 2] <= a[i] + a[i + 2] + 1);
  const over = (boxes) => boxes.flatMap(({ title, b }, i) =>
    boxes.slice(0, i).filter((other) => !apart(b, other.b)).map((other) => [title, other.title]));
  const outside = nodes.filter(({ b }) => !groups.some((group) => holds(group.b, b))).map(({ title }) => title);
  const hasWords = (element) => [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const isCut = (e) => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflow !== "visible";
  const cut = [...document.querySelectorAll("[data-node-id] *, .tdpo-panel *")].filter((e) => hasWords(e) && isCut(e));
  const words = cut.map((e) => e.textContent).filter((text) => !text.endsWith(".safetensors"));
  return { over: over(nodes), groups: over(groups), outside, cut: words, scale };
}"""
LEAST_FONT = 8  # pixels; classic nodes drop text that would be smaller
FONT = 14  # pixels of a node's text at 100 %


@pytest.mark.parametrize("shared_tab", BOTH, indirect=True)
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "workflows").glob("*.json")))
def test_a_workflow_is_legible_as_it_opens(shared_tab, name):
    """On a laptop's window and on a large one: nothing covers anything else, and nothing is cut off.

    Not in Vue nodes of frontend 1.27, which give ComfyUI's own nodes too another size than the file's.
    """
    graph, before = (
        json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")),
        shared_tab.page.viewport_size,
    )
    try:
        for width, height in ((1366, 768), (1920, 1080)):
            shared_tab.page.set_viewport_size({"width": width, "height": height})
            shared_tab.page.wait_for_timeout(500)
            shared_tab.page.evaluate(OPEN, graph)
            shared_tab.page.wait_for_timeout(1500)
            found = shared_tab.page.evaluate(FOUND)
            screenshot(shared_tab, f"opened-{name}-{width}")
            shared_tab.page.keyboard.press("Escape")  # a dialog about a missing model
            assert found.pop("scale") * FONT >= LEAST_FONT
            assert found == {"over": [], "groups": [], "outside": [], "cut": []}
    finally:
        shared_tab.page.set_viewport_size(before)
