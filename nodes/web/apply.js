// Takes a run's LoRA over into LoRA Apply.

const NODE = "TDPOApplyLoRA";

/** The LoRA Apply nodes that take the run of a Train node; if none does, those of `all` that take none. */
export function applyNodes(train, all) {
  const is = (node) => node?.comfyClass === NODE;
  const wired = (train.getOutputNodes?.(0) ?? []).filter(is);
  const isFree = (node) => !node.isInputConnected(node.inputs.findIndex(({ name }) => name === "run"));
  return wired.length ? wired : all.filter((node) => is(node) && isFree(node));
}

/** Set the snapshot, epoch and strength of LoRA Apply nodes; returns a sentence that says what was done. */
export function takeOver(nodes, { snapshot, epoch, strength = 1 }) {
  if (!nodes.length) return "There is no TDPO LoRA Apply node. Add one, and connect the output run to it.";
  for (const node of nodes) {
    for (const [name, value] of Object.entries({ snapshot, epoch, strength })) {
      const widget = node.widgets?.find((widget) => widget.name === name);
      if (!widget) continue;
      widget.value = value;
      widget.callback?.(value);
    }
    node.setDirtyCanvas?.(true, true);
  }
  const what = snapshot === "recommended" ? "the recommended LoRA" : `epoch ${epoch}`;
  return `TDPO LoRA Apply now takes ${what}, strength ${strength}. Press Run to see it.`;
}
