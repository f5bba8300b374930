// Every curve of rewards. The chart has small multiples: one pair of axes per reward, as their units differ, above a
// shared epoch axis. A sparkline has one line per reward, each on a scale of its own.

import { heading, labels, limits, limitsWithBand, scale, ticks, ticksWithRoom } from "./model.js";

const SVG = "http://www.w3.org/2000/svg";
const RIGHT = 10, TITLE = 20, GAP = 10, FOOTER = 30; // pixels
const LEAST = 40, DIGIT = 6.6; // pixels for the labels of the values, and for each sign of them
const SMALLEST = 26; // minimum height of the axes of a reward; those of the training reward are twice as high

const COLORS = 8; // for the lines of several runs, as in tdpo.css; further lines are dashed

/** The minimum height at which a chart of `count` panels is readable. */
export const chartHeight = (count) => FOOTER + count * (TITLE + GAP) + (count + 1) * SMALLEST;

function shape(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const round = (x) => Math.round(x * 100) / 100;

const tracer = (x, y) => ({ epoch, value }) => `${round(x(epoch))},${round(y(value))}`;

const trace = (points, place) => shape("polyline", { points: points.map(place).join(" "), class: "tdpo-curve" });

/** The class that gives a run's lines their colour. */
export const colorClass = (color) => `tdpo-color-${color % COLORS}${color % (2 * COLORS) < COLORS ? "" : " tdpo-dashed"}`;

/** Small curves without axes, in `width` x `height` pixels. */
export function sparkline(curves, width, height) {
  const epochs = curves.flatMap(({ points }) => points.map(({ epoch }) => epoch));
  const x = scale([Math.min(...epochs), Math.max(...epochs)], [2, width - 2]);
  const lines = curves
    .filter(({ points }) => points.length > 1)
    .map(({ kind, points }) => {
      const place = tracer(x, scale(limits(points), [height, 0]));
      return shape("g", { class: `tdpo-${kind}` }, trace(points, place));
    });
  const box = { viewBox: `0 0 ${width} ${height}`, width, height };
  return shape("svg", { ...box, class: "tdpo-sparkline", "aria-hidden": "true" }, ...lines.reverse());
}

const epochOf = ({ epoch }) => epoch;

export class Chart {
  /** `onPoint` is called with the epoch under the pointer, or null; `onPick` with one that is clicked. */
  constructor(onPoint, onPick) {
    this.onPoint = onPoint;
    this.element = shape("svg", { class: "tdpo-chart", role: "img" });
    this.element.addEventListener("pointermove", (event) => this.#show(this.#epochAt(event)));
    this.element.addEventListener("pointerleave", () => this.#show(null));
    this.element.addEventListener("click", (event) => onPick(this.#epochAt(event)));
  }

  /**
   * Draw what chartOf or chartOfRuns has made, in `width` x `height` pixels, with a mark at the `picked` epoch, unless
   * it is null.
   */
  draw({ panels, last, since, spoken }, width, height, picked = null) {
    Object.assign(this, { panels, since, width, height, picked });
    this.epochs = [1, last];
    this.known = [...new Set(panels.flatMap(({ lines }) => lines.flatMap(({ points }) => points.map(epochOf))))];
    this.element.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.element.setAttribute("aria-label", spoken);
    this.#render();
  }

  #epochAt(event) {
    if (!this.known?.length) return null;
    const box = this.element.getBoundingClientRect(); // in pixels of the screen: the canvas may be zoomed
    const x = ((event.clientX - box.left) / box.width) * this.width;
    const distance = (epoch) => Math.abs(this.x(epoch) - x);
    return this.known.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  }

  #show(epoch) {
    if (epoch === this.pointed) return;
    this.pointed = epoch;
    this.onPoint(epoch);
    if (this.panels) this.#render();
  }

  #render() {
    const shares = this.panels.map(({ kind }) => (kind === "trained" ? 2 : 1));
    const free = this.height - FOOTER - this.panels.length * (TITLE + GAP);
    const share = Math.max(free, 0) / shares.reduce((a, b) => a + b, 0);
    let top = 0;
    const axes = this.panels.map((panel, i) => {
      const height = shares[i] * share;
      const found = { ...this.#yTicks(panel, height), top: top + TITLE, bottom: top + TITLE + height };
      top = found.bottom + GAP;
      return found;
    });
    const longest = Math.max(0, ...axes.flatMap(({ words }) => words.map((word) => word.length)));
    this.left = Math.max(LEAST, 6 + DIGIT * longest);
    this.x = scale(this.epochs, [this.left, this.width - RIGHT]);
    const parts = this.panels.map((panel, i) => this.#panel(panel, axes[i]));
    this.element.replaceChildren(...parts, this.#epochAxis(top - GAP));
  }

  #yTicks({ lines }, height) {
    const found = lines.map(({ points, band }) => (band ? limitsWithBand(points) : limits(points)));
    const domain = [Math.min(...found.map(([low]) => low)), Math.max(...found.map(([, high]) => high))];
    const marks = lines.some(({ points }) => points.length) ? ticksWithRoom(...domain, height) : [];
    return { domain, marks, words: labels(marks) };
  }

  #panel({ name, role, kind, read, lines }, { domain, marks, words, top, bottom }) {
    const y = scale(domain, [bottom, top]);
    const shown = lines.filter(({ points }) => points.length);
    const drawn = shown.map((line) => ({ ...line, at: this.#indexAt(line.points) }));
    const values = drawn.map(({ points, at, color }) => [read(points, at), color]);
    const group = shape("g", { class: `tdpo-${kind}` }, ...this.#heading(name, role, values, top - 6));
    group.append(...this.#yAxis(marks, words, y));
    group.append(...this.#shade(top, bottom));
    group.append(shape("line", { x1: this.left, x2: this.width - RIGHT, y1: bottom, y2: bottom, class: "tdpo-axis" }));
    for (const line of drawn) group.append(this.#line(line, y));
    if (drawn.length) group.append(...this.#pointer(top, bottom));
    return group;
  }

  /** What a panel shows, and the value of each of its lines at the epoch that is marked, else the newest. */
  #heading(name, role, values, y) {
    const several = values.length > 1;
    const spoken = values.map(([value]) => value).join("   ");
    const [short, shown] = heading(name, role, spoken, this.width - this.left - RIGHT);
    const quiet = shape("tspan", { class: "tdpo-quiet", dx: 6 }, shown);
    const whole = shape("title", {}, `${name}, ${role}`);
    const colored = values.map(([value, color], i) =>
      shape("tspan", { dx: i && 14, class: several ? colorClass(color) : "" }, value),
    );
    return [
      shape("text", { x: this.left, y, class: "tdpo-name" }, short, quiet, whole),
      shape("text", { x: this.width - RIGHT, y, class: "tdpo-value" }, ...colored),
    ];
  }

  get #marked() {
    return this.pointed ?? this.picked ?? null;
  }

  #indexAt(points) {
    const found = points.findLastIndex(({ epoch }) => epoch <= this.#marked);
    return this.#marked === null || found < 0 ? points.length - 1 : found;
  }

  #yAxis(marks, words, y) {
    return marks.flatMap((mark, i) => [
      shape("line", { x1: this.left, x2: this.width - RIGHT, y1: round(y(mark)), y2: round(y(mark)), class: "tdpo-grid" }),
      shape("text", { x: this.left - 6, y: round(y(mark)) + 3.5, class: "tdpo-tick tdpo-end" }, words[i]),
    ]);
  }

  #line({ points, at, band, color }, y) {
    const place = tracer(this.x, y);
    const edge = (sign) => points.map(({ epoch, value, spread }) => place({ epoch, value: value + sign * spread }));
    const group = shape("g", { class: color === undefined ? "" : colorClass(color) });
    if (band) group.append(shape("polygon", { points: [...edge(1), ...edge(-1).reverse()].join(" "), class: "tdpo-band" }));
    const [cx, cy] = place(points[at]).split(",");
    group.append(trace(points, place), shape("circle", { cx, cy, r: 3.5, class: "tdpo-dot" }));
    return group;
  }

  #shade(top, bottom) {
    if (this.since === null) return [];
    const [left, right] = [this.since, this.epochs[1]].map((epoch) => round(this.x(epoch)));
    const size = { x: left, y: top, width: Math.max(right - left, 1), height: Math.max(bottom - top, 0) };
    return [shape("rect", { ...size, class: "tdpo-overoptimised" })];
  }

  #pointer(top, bottom) {
    if (this.#marked === null) return [];
    const x = round(this.x(this.#marked));
    return [shape("line", { x1: x, x2: x, y1: top, y2: bottom, class: "tdpo-pointer" })];
  }

  #epochAxis(top) {
    const marks = ticks(...this.epochs, Math.max(2, Math.floor((this.width - this.left - RIGHT) / 48)), true);
    const numbers = marks.map((tick) =>
      shape("text", { x: round(this.x(tick)), y: top + 14, class: "tdpo-tick tdpo-middle" }, String(tick)),
    );
    const words = this.#marked === null ? "epoch" : `epoch ${this.#marked}`;
    const middle = (this.left + this.width - RIGHT) / 2;
    return shape("g", {}, ...numbers, shape("text", { x: middle, y: top + 27, class: "tdpo-tick tdpo-middle" }, words));
  }
}
