"""The live node: what it knows without a page, under Node or Chromium, and what is seen of it, in a real browser with
ComfyUI's real frontend and server.
"""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

WEB = Path(__file__).parent.parent / "nodes" / "web"

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


@pytest.mark.parametrize(
    ("runs", "remembered", "chosen"),
    [
        ([], None, None),
        ([], "gone", None),
        ([("b", "4", "finished"), ("a", "4", "stopped")], None, "b"),
        ([("b", "4", "finished"), ("a", "4", "stopped")], "a", "a"),
        ([("b", "4", "finished"), ("a", "4", "running")], "b", "a"),
        ([("b", "4", "finished")], "gone", "b"),
        ([("c", "9", "running"), ("b", "4", "finished")], None, "b"),
        ([("c", "12:4", "running")], None, None),
        ([("c", None, "running")], None, None),
        ([("c", "9", "finished")], "c", "c"),
    ],
)
def test_which_run_a_node_shows(evaluate, runs, remembered, chosen):
    told = [{"id": id, "node": node, "state": state} for id, node, state in runs]
    assert evaluate(f"m.chooseRun({json.dumps(told)}, ['4'], {json.dumps(remembered)})") == chosen


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
    assert [(curve["name"], curve["trained"], len(curve["points"])) for curve in curves] == [
        ("a + 0.5 b", True, 2),
        ("gold", False, 1),
        ("x", False, 1),
    ]


@pytest.mark.parametrize(("low", "high", "count"), [(3.9, 7.2, 2), (0.55, 0.8, 2), (-1, 1, 5), (1e-4, 3e-4, 3), (0, 1e6, 6)])
def test_ticks_are_round_inside_and_few(evaluate, low, high, count):
    ticks = evaluate(f"m.ticks({low}, {high}, {count})")
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in zip(ticks, ticks[1:], strict=False)}
    assert 2 <= len(ticks) <= count + 1
    assert low <= ticks[0] and ticks[-1] <= high
    assert steps == {1}
    assert float(f"{ticks[1] - ticks[0]:.0e}") == pytest.approx(ticks[1] - ticks[0])  # one digit


@pytest.mark.parametrize(("low", "high"), [(1, 2), (1, 15), (1, 100), (1, 9999)])
def test_epochs_are_whole(evaluate, low, high):
    ticks = evaluate(f"m.ticks({low}, {high}, 6, true)")
    assert len(ticks) >= 2 and all(float(tick).is_integer() for tick in ticks)


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
        ("m.number(1234.5)", "1235"),
        ("m.number(1e-5)", "1.0e\N{MINUS SIGN}5"),
        ("m.number(NaN)", "\N{EN DASH}"),
        ("m.signed(0.4)", "+0.40"),
        ("m.reading([])", ""),
        ("m.reading([{ value: 5.14, spread: 1.2 }])", "5.14"),
        ("m.reading([{ value: 5.14, spread: 1.2 }, { value: 6.74, spread: 1 }])", "6.74 (+1.33 SD)"),
        ("m.reading([{ value: 0.8, spread: 0 }, { value: 0.7, spread: 0 }])", "0.70 (\N{MINUS SIGN}0.10)"),
        ("m.position({ state: 'running', epoch: 4, epochs: 15 })", "Epoch 5 of 15"),
        ("m.position({ state: 'running', epoch: 15, epochs: 15 })", "Epoch 15 of 15"),
        ("m.position({ state: 'stopped', epoch: 4, epochs: 15 })", "4 of 15 epochs"),
        ("m.phaseText({ phase: 'sampling', phase_done: 48, phase_total: 96 })", "Sampling, 48 of 96"),
        ("m.phaseText({ phase: 'loading', phase_done: 0, phase_total: 0 })", "Loading…"),
        ("m.phaseText({ phase: '' })", ""),
        ("m.fraction(5, 0)", 0),
        ("m.fraction(7, 5)", 1),
        ("m.shortened('shapes-aesthetic + 0.5 shapes-judge', 63)", "shapes-ae…"),
        ("m.shortened('gold', 63)", "gold"),
    ],
)
def test_words_and_numbers(evaluate, expression, words):
    assert evaluate(expression) == words


STATUS = {"id": "a", "node": "4", "state": "running", "epoch": 2, "epochs": 5, "reward": "r", "eval_rewards": []}


@pytest.fixture
def store(javascript):
    """Runs a body with `runs`, `api`, `answers`, `asked`, a status `S` and `settle`, which waits for what is under way."""
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


def test_nobody_listens_when_nobody_watches(store):
    state = store(f"""{RUNS}
      const end = runs.watch(() => {{}}); await settle();
      end();
      api.tell("tdpo.progress", {{ ...S, epoch: 5, metrics: null }}); await settle();
      return [runs.find("a").epoch, asked];
    """)
    assert state == [2, ["GET /tdpo/runs"]]
