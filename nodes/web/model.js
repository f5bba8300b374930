// The logic of the live node that needs no DOM: which run a node shows, how metrics are merged, scales and texts.
// No imports, so that it runs anywhere.

const ACTIVE = new Set(["waiting", "running", "stopping"]);
const MINUS = "\u2212";

export const isActive = (status) => ACTIVE.has(status?.state);

// --- which run belongs to which node

/**
 * The ids by which the server knows a node: its own, or a path such as "12:3" for each place its subgraph is used.
 *
 * `graph` is the root; a node that stands for a subgraph has it as `subgraph`.
 */
export function executionIds(node, graph, path = "", above = new Set()) {
  if (!graph || above.has(graph)) return [];
  const inside = new Set(above).add(graph);
  return (graph.nodes ?? []).flatMap((other) => [
    ...(other === node ? [path + other.id] : []),
    ...(other.subgraph ? executionIds(node, other.subgraph, `${path}${other.id}:`, inside) : []),
  ]);
}

/** All nodes of a graph and of the subgraphs in it. */
export function nodesWithin(graph, seen = new Set()) {
  if (!graph || seen.has(graph)) return [];
  seen.add(graph);
  return (graph.nodes ?? []).flatMap((node) => [node, ...nodesWithin(node.subgraph, seen)]);
}

/**
 * The id of the run a node shows: the one it is training, else the one it remembers if that has its `name`, else the
 * newest with its name, else the one it remembers, else null. Without a name, it is the newest run of the node.
 *
 * `place` is where the node is: the `ids` by which the server knows it, which nodes of other workflows may share, and
 * the id of its `workflow`.
 */
export function chooseRun(runs, { ids, workflow = null }, remembered = null, name = null) {
  const named = ({ id }) => id === name || (id.startsWith(`${name}-`) && /^\d+$/.test(id.slice(name.length + 1)));
  const sameWorkflow = (run) => (run.workflow == null ? name === null || named(run) : run.workflow === workflow);
  const own = runs.filter((run) => run.node != null && ids.includes(String(run.node)) && sameWorkflow(run));
  const kept = runs.find((run) => run.id === remembered);
  const known = (kept && named(kept) ? kept : runs.find(named)) ?? kept;
  const chosen = own.find(isActive) ?? known ?? (name === null ? own[0] : null);
  return chosen?.id ?? null;
}

// --- which settings have no effect

const PART = `(?:[\\w-]+|"[^"]*"|'[^']*')`;
const NAME = `\\s*(${PART}(?:\\s*\\.\\s*${PART})*)\\s*`;
const HEADER = new RegExp(`^\\s*\\[${NAME}\\]`);
const KEY = new RegExp(`^${NAME}=`);

/** The dotted names that lines of TOML set, such as "kl.target". */
export function settingNames(text) {
  let table = "";
  const names = [];
  for (const line of text.split("\n")) {
    const [header, key] = [HEADER, KEY].map((pattern) => plain(line.match(pattern)?.[1]));
    if (/^\s*\[/.test(line)) table = `${header ?? "?"}.`; // "?": no name, so that no setting is taken for another
    if (key) names.push(table + key);
  }
  return names;
}

/** A dotted name without the spaces and quotes that it does not need. */
const plain = (name) => name?.replace(/\s*\.\s*/g, ".").replace(/(["'])([\w-]+)\1/g, "$2");

/**
 * What has no effect with the algorithm, in words, and whether a run would be refused for it. Nothing is said of a
 * critic, or of its resets, about which the settings decide.
 *
 * `algorithm` is empty if a wire decides about it; `usedBy` is what the node's definition says; `wired` is whether a
 * critic is connected, `settings` the text.
 */
export function unused(algorithm, usedBy, { wired, settings }) {
  if (!algorithm) return { text: "", refused: false };
  const uses = (names) => names.includes(algorithm);
  const names = settingNames(settings);
  const decided = (section, key) => names.includes(section) || names.includes(`${section}.${key}`);
  const without = !uses(usedBy.critic) && !decided("critic", "enabled");
  const unreset = !uses(usedBy.resets) && !decided("critic", "enabled") && !decided("neurons", "reset");
  const notUsed = (all) =>
    names.filter((name) => {
      const users = Object.entries(all).flatMap(([known, those]) => (`${known}.`.startsWith(`${name}.`) ? those : []));
      return users.length && !uses(users);
    });
  const foreign = notUsed(usedBy.settings);
  const idle = without ? notUsed(usedBy.effects).filter((name) => !foreign.includes(name)) : [];
  const words = [];
  if (wired && without) words.push(`${algorithm} uses no critic: disconnect it, or the run is refused.`);
  else if (wired && unreset) {
    words.push(`${algorithm} resets no neurons, so the reset settings of TDPO Temporal Critic have no effect.`);
  }
  if (idle.length) words.push(`In settings, these have no effect: ${idle.join(", ")}.`);
  if (foreign.length) words.push(`In settings, remove what is for other algorithms: ${foreign.join(", ")}.`);
  return { text: words.join(" "), refused: (wired && without) || foreign.length > 0 };
}

// --- metrics

/** `known` updated with `fresh`, sorted by epoch, without epochs after `last`, which a resumed run has dropped. */
export function mergeMetrics(known, fresh, last = Infinity) {
  const byEpoch = new Map([...known, ...fresh].map((metrics) => [metrics.epoch, metrics]));
  return [...byEpoch.values()].filter(({ epoch }) => epoch <= last).sort((a, b) => a.epoch - b.epoch);
}

/** The epoch after which to request metrics: the last one that is known without a gap. */
export function cursor(metrics) {
  let last = 0;
  for (const { epoch } of metrics) if (epoch === last + 1) last = epoch;
  return last;
}

const ROLES = { trained: "trained on", part: "part of the sum", "held-out": "held out" };

/**
 * The curves of a run: first the training reward, then the rewards that it sums, then the tracked ones. Points without a
 * number are left out.
 */
export function curves(status, metrics) {
  const keys = [...new Set(metrics.flatMap(Object.keys))];
  const names = (kind) => keys.map((key) => key.match(`^${kind}/(.+)/mean$`)?.[1]).filter((name) => name !== undefined);
  const [trained = status.reward, ...parts] = names("reward");
  const tracked = new Set([...(status.eval_rewards ?? []), ...names("eval")]);
  return [
    curve("trained", "reward", trained, metrics),
    ...parts.map((name) => curve("part", "reward", name, metrics)),
    ...[...tracked].filter((name) => !parts.includes(name)).map((name) => curve("held-out", "eval", name, metrics)),
  ];
}

/**
 * What the chart of a run shows: panels from top to bottom, which each have lines in one unit; the last epoch of the
 * axis; the first epoch that is shaded, or null; and all this as text.
 */
export function chartOf(status, metrics) {
  const panels = curves(status, metrics).map(({ points, ...curve }) => ({
    ...curve,
    role: ROLES[curve.kind],
    read: reading,
    lines: [{ points, band: curve.kind === "trained" }],
  }));
  const last = lastShown(status.epochs, metrics.at(-1)?.epoch ?? 1);
  return { panels, last, since: status.overoptimised ?? null, spoken: spoken(status, metrics) };
}

/** The training and the watched reward of a row of the table of runs; the second is undefined if it watches none. */
export function rowCurves({ status, watched, metrics }) {
  const found = curves(status, metrics);
  return [found[0], found.find(({ name, kind }) => kind === "held-out" && name === watched)];
}

/**
 * The same for several rows of the table, each with a `color`: their training rewards above the watched ones. Rewards of
 * one name are shown as they are, others as changes since the first epoch in standard deviations.
 */
export function chartOfRuns(rows) {
  const found = rows.map((row) => ({ ...row, curves: rowCurves(row) }));
  const panels = ["trained", "held-out"].map((kind, which) => panelOfRuns(kind, found, which)).filter(Boolean);
  const done = Math.max(...panels.flatMap(({ lines }) => lines.map(({ points }) => points.at(-1).epoch)), 1);
  const told = panels.flatMap(({ read, lines, role }) =>
    lines.map(({ points, name }) => `${role} of ${name}: ${read(points)} in epoch ${points.at(-1).epoch}`),
  );
  return { panels, last: Math.max(done, 2), since: null, spoken: told.join("; ") || "No epoch has finished yet" };
}

function panelOfRuns(kind, rows, which) {
  const having = rows.filter(({ curves }) => curves[which]?.points.length);
  const names = [...new Set(having.map(({ curves }) => curves[which].name))];
  const role = kind === "trained" ? "training reward" : "watched reward";
  const alike = names.length === 1;
  const lines = having.map(({ id, color, curves }) => {
    const { points } = curves[which];
    return { name: id, color, points: alike ? points : inDeviationsOfFirst(points) };
  });
  const shown = lines.filter(({ points }) => points.length);
  if (!shown.length) return null;
  const at = (points, i) => points[i ?? points.length - 1].value;
  const read = (points, i) => (alike ? number(at(points, i)) : inDeviations(at(points, i)));
  return { name: alike ? names[0] : role, role: alike ? role : "change since epoch 1", kind, read, lines: shown };
}

/** The changes of a curve since its first epoch; no points if its spread is unknown. */
function inDeviationsOfFirst(points) {
  if (!(points[0].spread > 0)) return [];
  return points.map(({ epoch, value }) => ({ epoch, value: (value - points[0].value) / points[0].spread, spread: 0 }));
}

function curve(kind, prefix, name, metrics) {
  const [mean, std] = [`${prefix}/${name}/mean`, `${prefix}/${name}/std`];
  const points = metrics
    .filter((row) => Number.isFinite(row[mean]))
    .map((row) => ({ epoch: row.epoch, value: row[mean], spread: row[std] ?? 0 }));
  return { name, kind, points };
}

/** The change of a curve since its first epoch, in its own unit and, if its spread is known, in standard deviations. */
export function change(points, at = points.length - 1) {
  if (at < 1) return null;
  const difference = points[at].value - points[0].value;
  return { difference, deviations: points[0].spread > 0 ? difference / points[0].spread : null };
}

/** The newest epoch with a grid up to `epoch`, or of all if that is null; null if there is none. */
export function gridOf(grids, epoch) {
  const known = epoch === null ? grids : grids.filter((grid) => grid <= epoch);
  return known.length ? Math.max(...known) : null;
}

/**
 * The row and column of the image at a place in a grid that is shown in the middle of a `box`, as large as fits; null
 * beside the grid. `place` and `box` are in pixels of the screen, `image` has the grid's own size.
 */
export function cellAt(place, box, image, [rows, columns]) {
  const scale = Math.min(box.width / image.width, box.height / image.height);
  const x = (place.x - (box.width - image.width * scale) / 2) / (image.width * scale);
  const y = (place.y - (box.height - image.height * scale) / 2) / (image.height * scale);
  if (x < 0 || x >= 1 || y < 0 || y >= 1) return null;
  return { row: Math.floor(y * rows), col: Math.floor(x * columns) };
}

/** The name of the taste that a run trains on, or the name of a new one. */
export const tasteOf = ({ reward }) => reward?.match(/taste:(.+?)(?= [/+] |$)/)?.[1] ?? "my taste";

/** What to do next with a ballot: vote on, or train. */
export function ballotText({ votes, liked, disliked, pairs, needed }) {
  const counted = `${numberOf(votes, "vote")} so far (♥ ${liked}, ✕ ${disliked}).`;
  if (!pairs && !(liked && disliked)) {
    return `${counted} Click on the pictures you like, then press Dislike and click on those you do not like. Training starts with ${needed} votes of both kinds.`;
  }
  if (votes < needed) return `${counted} ${needed} are needed before training starts: vote on, then press Run.`;
  return `${counted} Press Run to train on them.`;
}

// --- scales

/** A function from the domain [a, b] to the range [c, d]. */
export const scale = ([a, b], [c, d]) => (x) => c + ((x - a) / (b - a || 1)) * (d - c);

/** Round numbers in [low, high]: about `count` of them, and at least two if possible. */
export function ticks(low, high, count, whole = false) {
  if (!(high > low)) return [low];
  const power = 10 ** Math.floor(Math.log10(high - low));
  const round = [10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05].map((m) => m * power);
  const steps = round.filter((step) => !whole || Number.isInteger(step));
  const [first, last] = [(step) => Math.ceil(low / step - 1e-9), (step) => Math.floor(high / step + 1e-9)];
  const amount = (step) => last(step) - first(step) + 1;
  const enough = steps.filter((step) => amount(step) >= 2);
  const step = enough.findLast((step) => amount(step) <= count) ?? enough[0] ?? steps.at(-1);
  const found = Array.from({ length: amount(step) }, (_, i) => Number(((first(step) + i) * step).toPrecision(12)));
  const stride = found.length <= count + 1 ? 1 : Math.ceil((found.length - 1) / Math.max(count - 1, 1));
  return found.filter((_, i) => i % stride === 0);
}

const APART = 12; // pixels between two labels, so that they do not overlap

/** The ticks of an axis of `height` pixels, with room for the label of each. */
export function ticksWithRoom(low, high, height) {
  const found = ticks(low, high, Math.max(2, Math.floor(height / 24)));
  const apart = ((found[1] - found[0]) / (high - low)) * height;
  if (!(apart < APART)) return found;
  const finer = ticks(low, high, 8);
  return [finer[0], finer.at(-1)];
}

/** The limits of an axis that shows all points with some margin; never empty. */
export function limits(points) {
  if (!points.length) return [0, 1];
  const values = points.map(({ value }) => value);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const air = (high - low) * 0.12 || Math.abs(high) * 0.05 || 0.5;
  return [low - air, high + air];
}

/** Limits that also include the band of one standard deviation. */
export const limitsWithBand = (points) =>
  limits(points.flatMap(({ value, spread }) => [{ value: value - spread }, { value: value + spread }]));

/** The last epoch on the axis: the last of a short run; for a long run, at most twice the epochs done so far. */
export function lastShown(epochs, done) {
  let last = 10;
  while (last < done) last *= 2;
  return Math.max(Math.min(last, epochs), done, 2);
}

// --- words

/** A number with about three significant digits. */
export function number(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const extreme = size >= 1e5 || (size > 0 && size < 1e-3);
  const decimals = size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.0995 || size === 0 ? 2 : 3;
  return (extreme ? value.toExponential(1) : value.toFixed(decimals)).replaceAll("-", MINUS);
}

/** Such as "1 vote" and "2 votes". */
export const numberOf = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

export const signed = (value) => (value > 0 ? "+" : "") + number(value);

/** A change in standard deviations, to a hundredth, called spreads; what rounds to zero has no sign. */
export const inDeviations = (value) => (Math.abs(value) < 0.005 ? "0.00" : signed(value)) + " spreads";

/** The labels of ticks, with as many decimals as they need. */
export function labels(marks) {
  const exact = (decimals) => marks.every((mark) => Math.abs(Number(mark.toFixed(decimals)) - mark) <= 1e-9 * size);
  const size = Math.max(...marks.map(Math.abs));
  const decimals = [0, 1, 2, 3, 4, 5].find(exact);
  const scientific = decimals === undefined || size >= 1e5 || size < 1e-3;
  return marks.map((mark) => (scientific ? exponential(mark, marks) : mark.toFixed(decimals)).replaceAll("-", MINUS));
}

function exponential(mark, marks) {
  const digits = [0, 1, 2].find((d) => new Set(marks.map((other) => other.toExponential(d))).size === marks.length);
  return mark === 0 ? "0" : mark.toExponential(digits ?? 2);
}

/** The name of a curve, shortened if need be, and its role where both fit to the left of its value in `width` pixels. */
export function heading(name, role, value, width, size = 6.3) {
  const room = width - size * (value.length + 2);
  const withRole = room - size * (role.length + 1);
  if (withRole >= size * name.length) return [name, role];
  return [shortened(name, room), ""];
}

export function duration(seconds) {
  if (!Number.isFinite(seconds) || seconds < 0) return "";
  if (seconds < 99.5) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 100) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

/** "6.73 (+1.33 spreads)", or the change in its own unit if the spread is unknown; `at` is the index of the point. */
export function reading(points, at = points.length - 1) {
  if (!points.length) return "";
  const moved = change(points, at);
  if (!moved) return number(points[at].value);
  const { difference, deviations } = moved;
  return `${number(points[at].value)} (${deviations === null ? signed(difference) : inDeviations(deviations)})`;
}

/** A size on disk, in the units of file managers. */
export function bytes(size) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  const power = size < 1000 ? 0 : Math.min(Math.floor(Math.log10(size) / 3), units.length - 1);
  const value = size / 1000 ** power;
  return `${power > 0 && value < 9.95 ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

/** `text`, cut to fit `width` pixels at `size` pixels per character. */
export function shortened(text, width, size = 6.3) {
  const fits = Math.max(Math.floor(width / size), 1);
  return text.length <= fits ? text : `${text.slice(0, fits - 1).trimEnd()}…`;
}

/** The chart as text, for screen readers. */
export function spoken(status, metrics) {
  const parts = curves(status, metrics)
    .filter(({ points }) => points.length)
    .map(({ name, kind, points }) => {
      const role = { trained: "training reward", part: "part of the sum", "held-out": "held-out reward" }[kind];
      const [first, last] = [points[0], points.at(-1)].map(({ epoch, value }) => `${number(value)} in epoch ${epoch}`);
      return `${role} ${name}: ${first}, ${last}`;
    });
  if (status.overoptimised != null) parts.push(`overoptimisation since epoch ${status.overoptimised}`);
  return parts.length ? parts.join("; ") : "No epoch has finished yet";
}

const TITLES = {
  waiting: "Waiting to start",
  running: "Training",
  stopping: "Stopping and saving…",
  finished: "Finished",
  stopped: "Stopped",
  failed: "Failed",
  interrupted: "Interrupted",
};

/** Whether all epochs are trained, and the run chooses the LoRA that it recommends. */
const isChoosing = ({ state, epoch, epochs, phase }) => state === "running" && epoch > 0 && epoch >= epochs && Boolean(phase);

export const title = (status) => (isChoosing(status) ? "Choosing the LoRA" : (TITLES[status.state] ?? status.state));

/** The progress of a run: "Epoch 5 of 15" while it works on the fifth, "15 of 15 epochs" when it trains no longer. */
export function position(status) {
  const { epoch, epochs } = status;
  if (!isActive(status) || isChoosing(status)) return `${epoch} of ${numberOf(epochs, "epoch")}`;
  return `Epoch ${Math.min(epoch + 1, epochs)} of ${epochs}`;
}

export const fraction = (done, total) => (total > 0 ? Math.min(Math.max(done / total, 0), 1) : 0);

/** The fraction of a run that is done; only whole epochs count, as it is unknown how long each phase takes. */
export const progress = ({ epoch, epochs }) => fraction(epoch, epochs);

export function phaseText({ phase, phase_done: done, phase_total: total }) {
  if (!phase) return "";
  const name = phase[0].toUpperCase() + phase.slice(1);
  return total > 0 ? `${name}, ${Math.floor(done)} of ${total}` : `${name}…`;
}
