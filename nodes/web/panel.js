// The panel in the Train node: a run's state, progress, chart and samples, what to do next, and a button to stop it.
// All text from the server is set as text, never as HTML.

import { Chart, chartHeight } from "./chart.js";
import { curves, duration, fraction, isActive, phaseText, position, progress, title } from "./model.js";
import { pictureURL, runs } from "./runs.js";

const AWAY = "The server does not answer. Trying again…";
const HINT = "Press Run: the reward curve and sample images appear here during training.";
const WIDE = 540; // pixels from which on the samples stand beside the chart, and not below it

/** The height in pixels, as in tdpo.css, that a panel of this width needs to show all its content. */
export const leastHeight = (width) => (width >= WIDE ? 390 : 540);

function make(tag, className, attributes = {}, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

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

export class Panel {
  #chart = new Chart();
  #run = null; // the id of the run that is shown
  #refused = null; // why the last attempt to stop failed
  #asked = false; // whether a request to stop has not been answered yet
  #frame = null;

  constructor() {
    this.hint = make("p", "tdpo-hint", {}, HINT);
    this.state = make("strong", "tdpo-state", { role: "status" });
    this.name = make("span", "tdpo-run tdpo-quiet");
    this.button = make("button", "tdpo-stop", { type: "button" }, "Stop");
    this.epochs = new Bar("Epochs");
    this.phase = new Bar("Current phase");
    this.plot = make("div", "tdpo-plot", {}, this.#chart.element);
    this.image = make("img", "", { draggable: "false" });
    this.caption = make("figcaption", "tdpo-quiet");
    this.link = make("a", "", { target: "_blank", rel: "noopener" }, this.image);
    this.samples = make("figure", "tdpo-samples", {}, this.link, this.caption);
    this.message = make("p", "tdpo-message", { role: "status" });
    this.problem = make("p", "tdpo-problem", { role: "alert" });
    this.body = make(
      "div", "tdpo-body", {},
      make("div", "tdpo-head", {}, this.state, this.name, this.button),
      this.epochs.element, this.phase.element, this.problem, this.message,
      make("div", "tdpo-pictures", {}, this.plot, this.samples),
    );
    this.element = make("section", "tdpo-panel", { "aria-label": "Training" }, this.hint, this.body);
    this.button.addEventListener("click", () => this.#stop());
    this.image.addEventListener("error", () => (this.samples.hidden = true));
    this.image.addEventListener("load", () => (this.samples.hidden = false));
    for (const control of [this.button, this.link]) {
      control.addEventListener("pointerdown", (event) => event.stopPropagation()); // otherwise it would drag the node
    }
    this.observer = new ResizeObserver(() => this.#redraw());
    this.show(null);
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
    if (id !== this.#run) this.#refused = null;
    this.#run = id;
    const status = runs.find(id);
    this.hint.hidden = Boolean(status);
    this.body.hidden = !status;
    this.hint.textContent = runs.unreachable ? AWAY : HINT;
    if (!status) return;
    runs.load(id);
    this.#words(status);
    this.#picture(status);
    this.#redraw();
  }

  #words(status) {
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
    setText(this.problem, this.#refused ?? status.error ?? (runs.unreachable ? AWAY : ""));
    setText(this.message, status.message ?? "");
    for (const text of [this.problem, this.message]) text.hidden = !text.textContent;
  }

  #picture({ id, samples_epoch: epoch }) {
    if (epoch == null) {
      this.samples.hidden = true;
      return;
    }
    const url = pictureURL(id, "samples", epoch);
    if (this.image.getAttribute("src") === url) return;
    this.image.src = url;
    this.image.alt = epoch ? `Sample images after epoch ${epoch}` : "Sample images before training";
    this.link.href = url;
    this.link.setAttribute("aria-label", `${this.image.alt}, in full size`);
    this.caption.textContent = epoch ? `Samples after epoch ${epoch}` : "Samples before training";
  }

  #redraw() {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      const status = runs.find(this.#run);
      this.element.classList.toggle("tdpo-wide", this.element.offsetWidth >= WIDE);
      if (!status || !this.plot.clientWidth) return;
      const metrics = runs.metrics(status.id);
      const least = chartHeight(curves(status, metrics).length);
      this.plot.style.minHeight = `${least}px`;
      this.#chart.draw(status, metrics, this.plot.clientWidth, Math.max(this.plot.clientHeight, least));
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

/** Set a text only if it has changed: screen readers read it out every time it is set. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
