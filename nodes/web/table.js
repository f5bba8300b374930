// A dialog with all runs: what became of each, its curves, and how large it is. Ticked runs are compared on one chart, and
// can be deleted.

import { Chart, colorClass, sparkline } from "./chart.js";
import { keepPresses, make, makeButton, setText } from "./dom.js";
import { bytes, change, chartOfRuns, inDeviations, isActive, mergeMetrics, numberOf, rowCurves, signed, title } from "./model.js";
import { runs, table } from "./runs.js";

const SPARK = [110, 24]; // width and height in pixels
const COLUMNS = {
  name: ["Run"],
  state: ["State"],
  algorithm: ["Algorithm"],
  reward: ["Reward"],
  epochs: ["Epochs"],
  curves: ["Curves", "The training reward in blue, the watched reward in orange, each on a scale of its own"],
  gain: ["Gain", "Change of the training reward since the first epoch, in spreads: its standard deviations there"],
  watched: ["Watched", "The same for the held-out reward that is watched, and since when the run overoptimises"],
  size: ["Size"],
  modified: ["Last trained"],
};
const NOTHING_YET = { algorithm: "", watched: null, metrics: [], files: 0, bytes: 0, modified: null };
const NO_RUNS = "There are no runs yet. TDPO-R Train keeps them in output/tdpo.";

/** One line of the table. */
class Row {
  #shown = ""; // of what is shown, all that can change

  constructor(id, onTick) {
    this.tick = make("input", "", { type: "checkbox", "aria-label": `Tick ${id}` });
    this.tick.addEventListener("change", () => onTick(id, this.tick.checked));
    this.cells = Object.fromEntries(Object.keys(COLUMNS).map((name) => [name, make("td", `tdpo-cell-${name}`)]));
    this.element = make("tr", "", {}, make("td", "", {}, this.tick), ...Object.values(this.cells));
    this.#set("name", id);
  }

  show({ status, color, ...row }) {
    this.tick.checked = color !== undefined;
    const changing = [status.state, status.epoch, status.epochs, status.message, status.overoptimised, row.modified, row.metrics.length];
    if (changing.join() === this.#shown) return;
    this.#shown = changing.join();
    this.element.dataset.state = status.state;
    const [trained, watched] = rowCurves({ status, ...row });
    this.#set("state", title(status), status.error ?? status.message);
    this.#set("algorithm", row.algorithm);
    this.#set("reward", status.reward, watched ? `${status.reward}; watched: ${watched.name}` : undefined);
    this.#set("epochs", status.epochs ? `${status.epoch} of ${status.epochs}` : "");
    this.#set("gain", moved(trained));
    this.#set("watched", moved(watched));
    if (status.overoptimised != null) this.cells.watched.append(make("span", "tdpo-alarm", {}, `⚠ since ${status.overoptimised}`));
    this.cells.curves.replaceChildren(sparkline([trained, watched].filter(Boolean), ...SPARK));
    this.#set("size", row.modified === null ? "" : bytes(row.bytes), numberOf(row.files, "file"));
    this.#set("modified", row.modified === null ? "" : when(row.modified));
  }

  #set(name, text, hint = text) {
    this.cells[name].textContent = text;
    this.cells[name].title = hint;
  }
}

export class Table {
  #known = new Map(); // id -> what the server tells of a run beside its status
  #asked = new Set(); // ids of runs for which it was asked
  #rows = new Map(); // id -> Row
  #ticked = new Map(); // id -> the number of its colour
  #problem = ""; // why something could not be done
  #unwatch = null;

  constructor() {
    this.all = make("input", "", { type: "checkbox", "aria-label": "Tick all runs" });
    const heads = Object.entries(COLUMNS).map(([name, [label, hint]]) =>
      make("th", `tdpo-cell-${name}`, { scope: "col", title: hint ?? "" }, label),
    );
    this.body = make("tbody", "");
    const rows = make("table", "", {}, make("thead", "", {}, make("tr", "", {}, make("th", "", {}, this.all), ...heads)), this.body);
    this.none = make("p", "tdpo-hint", {}, "Reading the runs…");
    this.chart = new Chart(() => {}, () => {});
    this.plot = make("div", "tdpo-plot", {}, this.chart.element);
    this.legend = make("div", "tdpo-legend");
    this.overlay = make("div", "tdpo-overlay", {}, this.legend, this.plot);
    this.problem = make("p", "tdpo-problem", { role: "alert" });
    this.question = make("p", "tdpo-question");
    this.confirm = makeButton("tdpo-button tdpo-stop", "Delete");
    this.cancel = makeButton("tdpo-button", "Keep");
    this.asking = make(
      "div", "tdpo-asking", { role: "group", "aria-label": "Delete these runs?" },
      this.question, make("div", "tdpo-row", {}, this.confirm, this.cancel),
    );
    this.stop = makeButton("tdpo-button tdpo-stop", "Stop");
    this.remove = makeButton("tdpo-button tdpo-stop", "Delete…");
    this.said = make("span", "tdpo-quiet", { role: "status" });
    this.close = makeButton("tdpo-button", "Close");
    this.element = make(
      "dialog", "tdpo-runs", { "aria-label": "Runs" },
      make("div", "tdpo-head", {}, make("strong", "tdpo-title", {}, "Runs"), this.close),
      make("div", "tdpo-rows", {}, rows, this.none),
      this.overlay, this.problem, this.asking,
      make("div", "tdpo-row", {}, this.stop, this.remove, this.said),
    );
    this.all.addEventListener("change", () => this.#tick(runs.list.map(({ id }) => id), this.all.checked));
    this.stop.addEventListener("click", () => this.#each(({ id }) => runs.stop(id), this.#active));
    this.remove.addEventListener("click", () => this.#ask());
    this.confirm.addEventListener("click", () => this.#delete());
    this.cancel.addEventListener("click", () => this.#tick([], false));
    this.close.addEventListener("click", () => this.element.close());
    this.element.addEventListener("close", () => this.#end());
    this.observer = new ResizeObserver(() => this.#draw());
    keepPresses(this.element);
  }

  open() {
    this.asking.hidden = true;
    document.body.append(this.element);
    this.element.showModal();
    this.observer.observe(this.plot);
    this.#unwatch = runs.watch(() => this.#show(true));
    this.#show(runs.list.length > 0);
  }

  #end() {
    this.#unwatch();
    this.observer.disconnect();
    this.element.remove();
  }

  /** Ask for what is not known of new runs. */
  async #load(fresh) {
    for (const { id } of fresh) this.#asked.add(id);
    try {
      this.#known = new Map((await table()).map((row) => [row.id, row]));
    } catch (error) {
      this.#problem = `The runs could not be listed: ${error.message}`;
    }
    this.#show(true);
  }

  #row(status) {
    const known = this.#known.get(status.id) ?? NOTHING_YET;
    const metrics = mergeMetrics(known.metrics, runs.metrics(status.id), status.epoch);
    return { ...known, id: status.id, status, metrics, color: this.#ticked.get(status.id) };
  }

  get #chosen() {
    return runs.list.filter(({ id }) => this.#ticked.has(id)).map((status) => this.#row(status));
  }

  /** Those of the ticked runs that train or wait. */
  get #active() {
    return this.#chosen.filter(({ status }) => isActive(status));
  }

  #show(listed) {
    const fresh = runs.list.filter(({ id }) => !this.#asked.has(id));
    if (fresh.length) this.#load(fresh);
    const elements = runs.list.map((status) => {
      if (!this.#rows.has(status.id)) this.#rows.set(status.id, new Row(status.id, (id, ticked) => this.#tick([id], ticked)));
      const row = this.#rows.get(status.id);
      row.show(this.#row(status));
      return row.element;
    });
    const same = elements.length === this.body.children.length && elements.every((e, i) => e === this.body.children[i]);
    if (!same) this.body.replaceChildren(...elements); // else they would lose the focus
    this.none.hidden = elements.length > 0;
    if (listed) setText(this.none, NO_RUNS);
    const chosen = this.#chosen;
    this.all.checked = chosen.length > 0 && chosen.length === elements.length;
    this.all.indeterminate = chosen.length > 0 && !this.all.checked;
    this.stop.disabled = this.#active.length === 0;
    this.remove.disabled = chosen.length === 0 || !this.asking.hidden;
    setText(this.said, chosen.length ? `${counted(chosen)} ticked` : "Tick runs to compare, stop or delete them.");
    setText(this.problem, this.#problem);
    this.problem.hidden = !this.#problem;
    this.#draw();
  }

  /** Tick or untick runs; with none, only take back the question whether to delete those that are ticked. */
  #tick(ids, ticked) {
    for (const id of ids) {
      if (!ticked) this.#ticked.delete(id);
      else if (!this.#ticked.has(id)) this.#ticked.set(id, this.#freeColor());
    }
    this.asking.hidden = true;
    this.#problem = "";
    this.#show(true);
  }

  /** A run keeps its colour while others are ticked and unticked. */
  #freeColor() {
    const used = new Set(this.#ticked.values());
    let color = 0;
    while (used.has(color)) color += 1;
    return color;
  }

  #draw() {
    const chosen = this.#chosen;
    const chart = chartOfRuns(chosen);
    this.overlay.hidden = chart.panels.length === 0;
    if (this.overlay.hidden) return;
    this.legend.replaceChildren(
      ...chosen.map(({ id, color }) => make("span", colorClass(color), { title: id }, make("i", "tdpo-swatch"), id)),
    );
    this.chart.draw(chart, this.plot.clientWidth, this.plot.clientHeight);
  }

  // --- deleting

  #ask() {
    const chosen = this.#chosen;
    const active = this.#active.map(({ id }) => id);
    this.#problem = active.length ? `Still training or waiting: ${active.join(", ")}. Stop or untick these first.` : "";
    this.asking.hidden = active.length > 0;
    const each = chosen.map((row) => `${row.id} (${bytes(row.bytes)}, ${numberOf(row.files, "file")})`);
    setText(
      this.question,
      `Delete ${counted(chosen)}, with settings, metrics, samples, LoRAs and checkpoints? ${each.join("; ")}. This cannot ` +
        "be undone. LoRAs that Load LoRA lists stay in models/loras/tdpo.",
    );
    this.#show(true);
    if (!this.asking.hidden) this.cancel.focus();
  }

  async #delete() {
    this.asking.hidden = true;
    await this.#each(async ({ id }) => {
      await runs.remove(id);
      for (const kept of [this.#ticked, this.#rows, this.#asked, this.#known]) kept.delete(id);
    }, this.#chosen);
    await runs.refresh();
  }

  /** Do something to each of the rows, and show why it failed for some. */
  async #each(work, rows) {
    const failed = [];
    for (const row of rows) await work(row).catch((error) => failed.push(error.message));
    this.#problem = failed.join("; ");
    this.#show(true);
  }
}

function moved(curve) {
  const found = curve && change(curve.points);
  if (!found) return "";
  return found.deviations === null ? signed(found.difference) : inDeviations(found.deviations);
}

function counted(rows) {
  const size = bytes(rows.reduce((sum, row) => sum + row.bytes, 0));
  return `${numberOf(rows.length, "run")}, ${size}`;
}

const when = (seconds) => new Date(1000 * seconds).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
