// The panel in the Train node: a run's state, progress, chart and samples, what to do next, and a button to stop it.
// All text from the server is set as text, never as HTML.

import { Chart, chartHeight } from "./chart.js";
import { Comparison } from "./compare.js";
import { keepPresses, make, makeButton, setText } from "./dom.js";
import { chartOf, duration, fraction, gridOf, isActive, phaseText, position, progress, title } from "./model.js";
import { gridURL, RETRY, runs } from "./runs.js";
import { Table } from "./table.js";

const AWAY = "The server does not answer. Trying again…";
const HINT = "Press Run: the reward curve and sample images appear here during training.";
const WIDE = 520; // pixels from which on the samples stand beside the chart, and not below it

/** The least height of a panel in pixels, as in tdpo.css; it scrolls if it has more to show. */
export const LEAST_HEIGHT = 480;

/** A label above a progress bar; both are hidden if there is no text. */
class Bar {
  label = make("span", "tdpo-bar-label");
  more = make("span", "tdpo-quiet");
  #fill = make("div", "tdpo-fill");

  constructor(name) {
    const range = { "aria-label": name, "aria-valuemin": 0, "aria-valuemax": 100 };
    this.track = make("div", "tdpo-track", { role: "progressbar", ...range }, this.#fill);
    this.element = make("div", "tdpo-bar", {}, make("div", "tdpo-line", {}, this.label, this.more), this.track);
  }

  set(text, more, share) {
    this.element.hidden = !text;
    this.label.textContent = text;
    this.more.textContent = more;
    this.#fill.style.width = `${100 * share}%`;
    this.track.setAttribute("aria-valuenow", Math.round(100 * share));
    this.track.setAttribute("aria-valuetext", `${text} ${more}`.trim());
  }
}

/** Samples with a caption, which open in full size. What fails to load is hidden and requested again, ever less often. */
class Samples {
  #url = null;
  #wait = RETRY;

  constructor() {
    this.image = make("img", "", { draggable: "false" });
    this.caption = make("figcaption", "tdpo-quiet");
    this.link = make("a", "", { target: "_blank", rel: "noopener" }, this.image);
    this.element = make("figure", "tdpo-samples", {}, this.link, this.caption);
    this.image.addEventListener("error", () => this.#failed(this.#url));
    this.image.addEventListener("load", () => (this.element.hidden = false));
    keepPresses(this.link);
  }

  #failed(url) {
    this.element.hidden = true;
    setTimeout(() => this.#retry(url), this.#wait);
    this.#wait *= 2;
  }

  #retry(url) {
    if (url !== this.#url) return;
    if (this.element.isConnected) this.image.src = url;
    else this.#url = null; // requested when it is shown again
  }

  /** Show the samples of an epoch, or nothing if it is null. */
  show(id, epoch) {
    const url = epoch === null ? null : gridURL(id, epoch);
    if (url === null) this.element.hidden = true;
    if (url === this.#url) return;
    this.#url = url;
    if (url === null) return;
    this.#wait = RETRY;
    this.image.src = url;
    this.image.alt = epoch ? `Sample images after epoch ${epoch}` : "Sample images before training";
    this.link.href = url;
    this.link.setAttribute("aria-label", `${this.image.alt}, in full size`);
    setText(this.caption, epoch ? `after epoch ${epoch}` : "before training");
  }
}

export class Panel {
  #chart = new Chart((epoch) => this.#point(epoch), (epoch) => this.#pick(epoch));
  #take;
  #run = null; // the id of the run that is shown
  #pointed = null; // the epoch under the pointer
  #picked = null; // the epoch that was clicked; another click on it lets go of it
  #progress = ""; // the state and epoch that were last shown
  #taken = ""; // what was last taken over into LoRA Apply
  #refused = null; // why the last attempt to stop failed
  #failed = ""; // why the node failed when it last ran
  #asked = false; // whether a request to stop has not been answered yet
  #frame = null;

  /**
   * `take` takes a LoRA over into LoRA Apply, and returns a sentence that says so. `fold` is called with whether to hide
   * the node's advanced settings; false where there is no need for a button.
   */
  constructor(take, fold) {
    this.#take = take;
    this.hint = make("p", "tdpo-hint", {}, HINT);
    this.state = make("strong", "tdpo-state", { role: "status" });
    this.name = make("span", "tdpo-run tdpo-quiet");
    this.button = makeButton("tdpo-button tdpo-stop", "Stop");
    this.epochs = new Bar("Epochs");
    this.phase = new Bar("Current phase");
    this.plot = make("div", "tdpo-plot", {}, this.#chart.element);
    this.before = new Samples();
    this.after = new Samples();
    this.use = makeButton("tdpo-button");
    this.useEpoch = makeButton("tdpo-button");
    this.compare = makeButton("tdpo-button", "Compare and vote…");
    this.message = make("p", "tdpo-message", { role: "status" });
    this.problem = make("p", "tdpo-problem", { role: "alert" });
    this.body = make(
      "div", "tdpo-body", {},
      make("div", "tdpo-head", {}, this.state, this.name, this.button),
      this.epochs.element, this.phase.element, this.problem, this.message,
      make("div", "tdpo-row", {}, this.use, this.useEpoch, this.compare),
      make("div", "tdpo-pictures", {}, this.plot, make("div", "tdpo-pair", {}, this.before.element, this.after.element)),
    );
    this.all = makeButton("tdpo-link tdpo-quiet", "All runs…");
    this.unused = make("p", "tdpo-unused tdpo-quiet", { role: "status" });
    const top = make("div", "tdpo-top", {}, this.#makeMore(fold), this.unused, this.all);
    this.element = make("section", "tdpo-panel", { "aria-label": "Training" }, top, this.hint, this.body);
    this.button.addEventListener("click", () => this.#stop());
    this.use.addEventListener("click", () => this.#takeOver(runs.find(this.#run)?.use));
    this.useEpoch.addEventListener("click", () => this.#takeOver({ snapshot: "epoch", epoch: this.#picked }));
    this.compare.addEventListener("click", () => this.#openComparison());
    this.all.addEventListener("click", () => new Table().open());
    for (const control of [this.all, this.button, this.use, this.useEpoch, this.compare, this.plot]) keepPresses(control);
    this.observer = new ResizeObserver(() => this.#redraw());
    this.show(null);
  }

  /** A button that shows the node's advanced settings, and hides them again. */
  #makeMore(fold) {
    const button = makeButton("tdpo-link tdpo-quiet", "▸ More settings");
    button.setAttribute("aria-expanded", "false");
    button.hidden = !fold;
    keepPresses(button);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-expanded") === "false";
      button.setAttribute("aria-expanded", String(shown));
      setText(button, shown ? "▾ Fewer settings" : "▸ More settings");
      fold(!shown);
    });
    return button;
  }

  /** Say which of the node's settings have no effect, and whether a run would be refused for it. */
  showUnused({ text, refused }) {
    setText(this.unused, text);
    this.unused.classList.toggle("tdpo-problem", refused);
  }

  /** Follow the size of the element until `detach`. */
  attach() {
    this.observer.observe(this.element);
    this.observer.observe(this.plot);
  }

  detach() {
    this.observer.disconnect();
    cancelAnimationFrame(this.#frame);
    this.#frame = null;
  }

  /** Show the current state of the run with this id; null shows the hint. */
  show(id) {
    if (id !== this.#run) {
      this.#refused = this.#picked = this.#pointed = null;
      this.#taken = "";
    }
    this.#run = id;
    const status = runs.find(id);
    this.hint.hidden = Boolean(status);
    this.body.hidden = !status;
    this.hint.textContent = this.#failed || (runs.unreachable ? AWAY : HINT);
    this.hint.classList.toggle("tdpo-failed", Boolean(this.#failed));
    if (!status) return;
    runs.load(id);
    this.#words(status);
    this.#actions(status);
    this.#pictures(status);
    this.#redraw();
  }

  #words(status) {
    const now = `${status.id} ${status.state} ${status.epoch}`;
    if (now !== this.#progress) this.#taken = ""; // what the server says is newer
    this.#progress = now;
    const stopping = status.state === "stopping" || this.#asked;
    const shown = this.#asked ? { ...status, state: "stopping" } : status;
    this.element.dataset.state = shown.state;
    setText(this.state, title(shown));
    setText(this.name, isActive(status) ? status.id : `${status.id}, ${position(status)}`);
    this.name.title = status.id;
    this.button.hidden = !isActive(status);
    this.button.disabled = stopping;
    const left = duration(status.eta_s);
    const active = isActive(status);
    this.epochs.set(active ? position(status) : "", left ? `about ${left} left` : "", progress(status));
    this.phase.set(active ? phaseText(status) : "", "", fraction(status.phase_done, status.phase_total));
    setText(this.problem, this.#refused ?? (this.#failed || status.error) ?? (runs.unreachable ? AWAY : ""));
    setText(this.message, this.#taken || (this.#failed ? "" : (status.message ?? "")));
    for (const text of [this.problem, this.message]) text.hidden = !text.textContent;
  }

  /** Say why the node failed when the graph ran; an empty text when it runs again. */
  fail(text) {
    if (text === this.#failed) return;
    this.#failed = text;
    this.show(this.#run);
  }

  #actions({ use, kept, grids }) {
    this.use.hidden = !use;
    if (use) setText(this.use, use.label);
    this.useEpoch.hidden = !kept?.includes(this.#picked);
    setText(this.useEpoch, `Use epoch ${this.#picked}`);
    this.compare.hidden = !(grids?.length > 1);
  }

  /** The samples of the epoch that is pointed at or picked, else the newest, beside those from before training. */
  #pictures({ id, grids }) {
    const shown = gridOf(grids ?? [], this.#pointed ?? this.#picked);
    this.before.show(id, shown && grids.includes(0) ? 0 : null);
    this.after.show(id, shown);
  }

  #point(epoch) {
    this.#pointed = epoch;
    const status = runs.find(this.#run);
    if (status) this.#pictures(status);
  }

  #pick(epoch) {
    this.#picked = epoch === this.#picked ? null : epoch;
    this.show(this.#run);
  }

  #takeOver(what) {
    if (!what) return;
    this.#taken = this.#take(what);
    this.show(this.#run);
  }

  #openComparison() {
    const status = runs.find(this.#run);
    const epoch = gridOf(status.grids, this.#picked ?? status.use?.epoch ?? null);
    new Comparison().open(status, epoch, (what) => this.#takeOver(what));
  }

  #redraw() {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      const status = runs.find(this.#run);
      this.element.classList.toggle("tdpo-wide", this.element.offsetWidth >= WIDE);
      if (!status || !this.plot.clientWidth) return;
      const shown = chartOf(status, runs.metrics(status.id));
      const least = chartHeight(shown.panels.length);
      this.plot.style.minHeight = `${least}px`;
      this.#chart.draw(shown, this.plot.clientWidth, Math.max(this.plot.clientHeight, least), this.#picked);
    });
  }

  async #stop() {
    const id = this.#run;
    this.#asked = true;
    this.#refused = null;
    this.show(id);
    try {
      await runs.stop(id);
    } catch (error) {
      this.#refused = `The run could not be stopped: ${error.message}`;
    }
    this.#asked = false;
    this.show(this.#run);
  }
}
