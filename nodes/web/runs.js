// The state of the runs: read from the routes, kept current by the server's events.

import { api } from "../../scripts/api.js";
import { cursor, isActive, mergeMetrics } from "./model.js";

export const RETRY = 5000; // milliseconds until what failed is asked for again

async function ask(route, options) {
  const response = await api.fetchApi(`/tdpo/${route}`, options);
  const answer = await response.json().catch(() => null); // a proxy's error page is not JSON
  if (!response.ok || answer === null) {
    const error = new Error(answer?.error ?? `the server answered ${response.status}`);
    throw Object.assign(error, { status: response.status });
  }
  return answer;
}

/** Add a vote to a taste; returns the taste's status, or throws an Error that says why not. */
export const vote = (taste, fields) =>
  ask(`tastes/${encodeURIComponent(taste)}/votes`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(fields),
  });

/** What TDPO Taste showed last to be voted on; no pictures if nothing. */
export const ballotOf = (taste) => ask(`tastes/${encodeURIComponent(taste)}/ballot`);

/** The URL of a picture that TDPO Taste shows to be voted on. */
export const shownURL = (file) =>
  api.apiURL(`/view?type=temp&subfolder=tdpo_shown/images&filename=${encodeURIComponent(file)}`);

const runRoute = (id, rest = "") => `runs/${encodeURIComponent(id)}${rest}`;

/** The URL of the sample grid of an epoch, which never changes; 0 is before training. */
export const gridURL = (id, epoch) => api.apiURL(`/tdpo/${runRoute(id, `/samples/${epoch}`)}`);

/** The URL of what an epoch's LoRA draws at a strength; both 0 for the base model. */
export const strengthURL = (id, epoch, strength) =>
  api.apiURL(`/tdpo/${runRoute(id, `/strengths/${epoch}/${strength}`)}`);

/** The rows of the table of runs: of each, what its status does not have. */
export const table = async () => (await ask("table")).rows;

/** The URL of a picture of a run, by its name. */
export const plotURL = (id, name) => api.apiURL(`/tdpo/${runRoute(id, `/pictures/${name}`)}`);

/** The last evaluation of a run, or null and why there is none. */
export const evaluationOf = (id) =>
  ask(runRoute(id, "/evaluation")).then(
    (found) => [found, ""],
    (error) => [null, error.message],
  );

/** The server's runs, newest first. Shared by all nodes; listens and sends requests only while it is watched. */
class Runs {
  list = [];
  unreachable = false;
  #metrics = new Map(); // id -> epochs
  #events = new Map(); // id -> number of events received, to recognise answers older than an event
  #watchers = new Set();
  #asking = new Map(); // name of a request -> promise
  #asked = new Map(); // id -> the last epoch requested, so that a missing one is requested only once
  #retry = null;

  find(id) {
    return this.list.find((run) => run.id === id);
  }

  metrics(id) {
    return this.#metrics.get(id) ?? [];
  }

  /** Call `watcher` on every change; returns a function that ends this. */
  watch(watcher) {
    if (this.#watchers.size === 0) this.#listen("addEventListener");
    this.#watchers.add(watcher);
    this.refresh();
    return () => {
      this.#watchers.delete(watcher);
      if (this.#watchers.size > 0) return;
      this.#listen("removeEventListener");
      clearTimeout(this.#retry);
      this.#retry = null;
    };
  }

  #listen(method) {
    api[method]("tdpo.progress", this.#onProgress);
    api[method]("reconnected", this.refresh);
  }

  #changed() {
    for (const watcher of this.#watchers) watcher();
  }

  #onProgress = ({ detail }) => {
    const { metrics, ...status } = detail;
    this.#events.set(status.id, (this.#events.get(status.id) ?? 0) + 1);
    this.#put(status);
    if (metrics) this.#merge(status, [metrics]);
    this.load(status.id);
    this.#changed();
  };

  #put(status) {
    const known = this.list.findIndex((run) => run.id === status.id);
    if (known < 0) this.list = [status, ...this.list];
    else this.list = this.list.with(known, status);
  }

  #merge(status, fresh) {
    this.#metrics.set(status.id, mergeMetrics(this.metrics(status.id), fresh, status.epoch));
  }

  /** Request all runs again. */
  refresh = () =>
    this.#once("runs", async () => {
      const before = new Map(this.#events);
      const { runs } = await ask("runs");
      const moved = (run) => this.#events.get(run.id) !== before.get(run.id);
      const overtaken = this.list.filter((run) => moved(run));
      this.list = [
        ...overtaken.filter((run) => !runs.some(({ id }) => id === run.id)),
        ...runs.map((run) => overtaken.find(({ id }) => id === run.id) ?? run),
      ];
    });

  /** Request the epochs of a run that are not known yet, if there are any. */
  load(id) {
    const run = this.find(id);
    if (!run || cursor(this.metrics(id)) >= run.epoch || this.#asked.get(id) === run.epoch) return;
    this.#asked.set(id, run.epoch);
    this.#once(`metrics of ${id}`, async () => {
      const { metrics } = await ask(runRoute(id, `/metrics?after=${cursor(this.metrics(id))}`));
      this.#merge(this.find(id) ?? run, metrics);
    });
  }

  /** Ask a run to stop; throws an Error that says why it cannot. */
  async stop(id) {
    try {
      const status = await ask(runRoute(id, "/stop"), { method: "POST" });
      if (isActive(this.find(id) ?? status)) this.#put(status); // else an event has said that it ended
      this.#changed();
    } catch (error) {
      if (error.status === 409) await this.refresh(); // it has ended in the meantime
      else throw error;
    }
  }

  /** Delete a run and its folder; throws an Error that says why it cannot. */
  async remove(id) {
    await ask(runRoute(id), { method: "DELETE" });
    for (const known of [this.#metrics, this.#asked]) known.delete(id); // another run may take its name
    this.list = this.list.filter((run) => run.id !== id);
    this.#changed();
  }

  /** Do `work` unless it is already running, then notify the watchers; if the server fails, request all again later. */
  #once(name, work) {
    if (this.#asking.has(name)) return this.#asking.get(name);
    const promise = work()
      .then(() => (this.unreachable = false))
      .catch((error) => {
        this.unreachable = !(error.status >= 400 && error.status < 500);
        if (!this.unreachable) return;
        this.#asked.clear();
        this.#later();
      })
      .finally(() => {
        this.#asking.delete(name);
        this.#changed();
      });
    this.#asking.set(name, promise);
    return promise;
  }

  #later() {
    if (this.#retry !== null || this.#watchers.size === 0) return;
    this.#retry = setTimeout(() => {
      this.#retry = null;
      this.refresh();
    }, RETRY);
  }
}

export const runs = new Runs();
