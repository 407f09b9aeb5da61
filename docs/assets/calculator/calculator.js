// The calculator of docs/calculator.md: bytes that training holds, full beside partial.
//
// What a parameter costs comes from calculator-data.js, which Python makes of the functions of `estimate_memory`; here formulas
// are evaluated and added up. Nothing is asked of any server. A test compares every number with Python's.
"use strict";

(function () {
  // --- arithmetic --------------------------------------------------------------------------------------------------

  const OPERATIONS = {
    "+": (a, b) => a + b,
    "-": (a, b) => a - b,
    "*": (a, b) => a * b,
    "//": (a, b) => Math.floor(a / b),
    "/": (a, b) => a / b,
    "<": (a, b) => a < b,
    "<=": (a, b) => a <= b,
    "==": (a, b) => a === b,
    min: (...values) => Math.min(...values),
    max: (...values) => Math.max(...values),
    ceil: Math.ceil,
  };

  function evaluated(tree, variables) {
    if (typeof tree === "number") return tree;
    if (typeof tree === "string") {
      if (!(tree in variables)) throw new Error(`a formula asks for ${tree}`);
      return variables[tree];
    }
    const [operation, ...parts] = tree;
    if (operation === "?") return evaluated(parts[evaluated(parts[0], variables) ? 1 : 2], variables);
    return OPERATIONS[operation](...parts.map((part) => evaluated(part, variables)));
  }

  const product = (numbers) => numbers.reduce((before, number) => before * number, 1);
  const sum = (numbers) => numbers.reduce((before, number) => before + number, 0);

  // choice: {model | kind and sizes, method, output, kept, optimizer, precision, frozenRows, tokens (or null)}
  function estimate(data, choice) {
    const entry = choice.model ? data.models[choice.model] : data.typed[choice.kind];
    const mode = entry.methods[choice.method][choice.output];
    const sizes = choice.model ? {} : typedSizes(choice);
    const size = (value) => (typeof value === "string" ? sizes[value] : value);
    const [full, partial] = [false, true].map((isPartial) => {
      const held = parametersOf(data, choice, entry.groups[mode.parameters], size, isPartial);
      const others = { shared: held.shared, buffers: mode.buffers, remap: 0, frozen: 0, loss: lossOf(data, choice, mode, size, isPartial) };
      if (isPartial) Object.assign(others, rowsOf(data, choice, mode, size));
      for (const [part, tree] of Object.entries(data.costs.others)) held.parts[part] = (held.parts[part] || 0) + evaluated(tree, others);
      held.parts.total_bytes = sum(Object.keys(data.parts).map((part) => held.parts[part] || 0));
      return held.parts;
    });
    const saved = full.total_bytes - partial.total_bytes;
    const fits = (bytes) => Object.fromEntries(Object.entries(data.cards).map(([card, limit]) => [card, bytes <= limit]));
    return {
      full,
      partial,
      saved_bytes: saved,
      saved_ratio: saved / full.total_bytes,
      vocabulary_ratio: full.vocabulary_bytes / full.total_bytes,
      saves_little: partial.frozen_bytes > 0 && saved / full.total_bytes < data.little,
      cards: { full: fits(full.total_bytes), partial: fits(partial.total_bytes) },
    };
  }

  // The other parameters lie in square matrices, and what is left over in one vector.
  function typedSizes({ vocabulary, width, others }) {
    return { vocabulary, width, matrices: Math.floor(others / (width * width)), rest: others % (width * width) };
  }

  function parametersOf(data, choice, groups, size, isPartial) {
    const { states, shared } = data.optimizers[choice.optimizer];
    const parts = {};
    let most = 0;
    for (const [shape, count, kind, bytesOf] of groups) {
      const its = shape.map(size);
      if (isPartial && kind.includes("v")) its[0] = choice.kept;
      const values = product(its);
      if (size(count) * values === 0) continue;
      const bytes = bytesOf[choice.precision];
      const lookup = kind.includes("e") ? "e" : "";
      let itsStates = 0;
      if (kind.includes("t")) {
        const [second, last] = its.length > 1 ? its.slice(-2) : [values, its[0]];
        const law = states[`${bytes}/${its.length > 1 ? "matrix" : "vector"}/${lookup}`];
        itsStates = evaluated(law, { values, per_last: values / last, per_second: values / second });
        most = Math.max(most, evaluated(shared[lookup], { values }));
      }
      const costs = data.costs[kind + (choice.precision === "mixed" ? "+" : "")];
      for (const [part, tree] of Object.entries(costs)) {
        parts[part] = (parts[part] || 0) + size(count) * evaluated(tree, { values, bytes, states: itsStates });
      }
    }
    return { parts, shared: most };
  }

  function keyOf(choice, keys) {
    return choice.output === "frozen" ? `${keys[choice.precision]}/${choice.frozenRows}` : keys[choice.precision];
  }

  function rowsOf(data, choice, mode, size) {
    let [remap, frozen] = [0, 0];
    for (const [rows, width, inputs, outputs, keys] of mode.tables) {
      const variables = { full: size(rows), kept: choice.kept, dim: size(width), inputs, outputs };
      remap += evaluated(data.remap, variables);
      if (keys && choice.output === "frozen") frozen += evaluated(data.frozen[keyOf(choice, keys)], variables);
    }
    return { remap, frozen };
  }

  function lossOf(data, choice, mode, size, isPartial) {
    if (choice.tokens === null || mode.losses.length === 0) return 0;
    return Math.max(
      ...mode.losses.map(([rows, number]) => {
        const tokens = choice.tokens;
        if (!isPartial || number === null) return evaluated(data.plain_loss, { tokens, full: size(rows) });
        const [full, dim, , , keys] = mode.tables[number];
        const variables = { tokens, full: size(full), kept: choice.kept, dim: size(dim) };
        return evaluated(data.losses[keyOf(choice, keys)], variables);
      }),
    );
  }

  // --- words -------------------------------------------------------------------------------------------------------

  function withCommas(number, digits = 0) {
    const [whole, rest] = number.toFixed(digits).split(".");
    return whole.replace(/\B(?=(\d{3})+$)/g, ",") + (rest ? `.${rest}` : "");
  }

  // In powers of 1,000 and three digits, as `leanvocab estimate` writes them.
  function formatBytes(bytes) {
    let value = bytes;
    let unit = "B";
    for (unit of ["B", "kB", "MB", "GB"]) {
      if (Math.abs(value) < 999.5 || unit === "GB") break;
      value /= 1000;
    }
    const digits = unit === "B" || Math.abs(value) >= 99.95 ? 0 : Math.abs(value) >= 9.995 ? 1 : 2;
    return `${withCommas(value, digits)} ${unit}`;
  }

  const formatRatio = (ratio) => `${(100 * ratio).toFixed(1)} %`;

  if (typeof module !== "undefined") {
    module.exports = { estimate, evaluated, formatBytes, formatRatio };
    return;
  }

  // --- the page ----------------------------------------------------------------------------------------------------

  const data = leanvocabData;
  const TASKS = {
    classification: "Encoders, as classifiers",
    "causal-lm": "Language models",
    "seq2seq-lm": "Encoder-decoders",
    speech: "Speech to text",
  };
  const KINDS = { encoder: "An encoder", tied: "A decoder, tied", untied: "A decoder, not tied" };
  const OPTIMIZERS = {
    adamw: "AdamW",
    sgd: "SGD",
    sgd_momentum: "SGD with momentum",
    adafactor: "Adafactor (transformers)",
    torch_adafactor: "Adafactor (torch)",
    adamw_8bit: "AdamW in 8 bits (bitsandbytes)",
  };
  const PRECISIONS = {
    fp32: ["fp32", "Weights, gradients and states."],
    bf16: ["bf16", "Weights, gradients and states."],
    mixed: ["mixed", "Weights, gradients and states in fp32; autocast computes in bf16."],
  };
  const BESIDE_FOUR_BITS = {
    fp32: ["fp32", "What is not in 4 bits."],
    mixed: ["mixed", "What is not in 4 bits is in fp32; autocast computes in bf16."],
  };
  const OUTPUTS = {
    None: ["none", ""],
    full: ["whole", "All of its rows train."],
    frozen: ["frozen", "Kept rows train; all rows are in the softmax."],
    restricted: ["restricted", "Kept rows alone are in the softmax: another objective."],
  };

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function field(name, label, control, hint) {
    const id = `leanvocab-${name}`;
    control.id = id;
    control.name = name;
    const box = element("div", { class: "lv-field", "data-field": name }, element("label", { for: id }, label), control);
    if (hint !== undefined) {
      control.setAttribute("aria-describedby", `${id}-hint`);
      box.append(element("p", { class: "lv-hint", id: `${id}-hint` }, hint));
    }
    return box;
  }

  const options = (names) => Object.entries(names).map(([value, text]) => element("option", { value }, text));
  const number = (value, most) => element("input", { type: "number", min: 1, max: most, step: 1, value, inputmode: "numeric" });

  function modelOptions() {
    const groups = Object.entries(TASKS).map(([task, label]) => {
      const names = Object.keys(data.models).filter((name) => data.models[name].task === task);
      return element("optgroup", { label }, ...names.map((name) => element("option", { value: name }, name)));
    });
    const typed = Object.entries(KINDS).map(([kind, text]) => element("option", { value: `typed:${kind}` }, text));
    return [...groups, element("optgroup", { label: "Sizes of your own" }, ...typed)];
  }

  function makeForm() {
    return element(
      "form",
      { class: "lv-form", "aria-label": "What is trained, and how" },
      field("model", "Model", element("select", {}, ...modelOptions())),
      field("vocabulary", "Rows of the vocabulary", number(250002, 1e7)),
      field("width", "Width of a row", number(768, 1e5)),
      field("others", "Other parameters", number(86e6, 1e12), "Those that are in no vocabulary matrix."),
      field("kept", "Rows kept", number(5000, 1e7), ""),
      field("task", "or those of a task", element("select", {}), ""),
      field("method", "What trains", element("select", {}, ...options({ all: "all weights", qlora: "LoRA on weights in 4 bits (QLoRA)" }))),
      field("optimizer", "Optimizer", element("select", {}, ...options(OPTIMIZERS))),
      field("precision", "Precision", element("select", {}), ""),
      field("output", "Output layer", element("select", {}), ""),
      field("frozen", "Frozen rows lie", element("select", {}, ...options({ device: "on the GPU", host: "on the host" }))),
      field("tokens", "Tokens in a batch", element("input", { type: "number", min: 1, max: 1e7, step: 1, inputmode: "numeric" }), "Empty: the loss is not counted."),
    );
  }

  function start(root) {
    const form = makeForm();
    const status = element("p", { class: "lv-status", role: "status", "aria-live": "polite" });
    const result = element("div", { class: "lv-result" });
    root.replaceChildren(form, status, result);
    form.elements.model.value = "FacebookAI/xlm-roberta-base";
    const update = (event) => {
      fit(form, event ? event.target.name : "model");
      show(form, status, result);
    };
    form.addEventListener("input", update);
    form.addEventListener("submit", (event) => event.preventDefault());
    update(null);
  }

  // Leaves in each choice what goes with the others.
  function fit(form, changed) {
    const { model, task, method, precision, output } = form.elements;
    const kind = typedKind(form);
    const entry = kind ? data.typed[kind] : data.models[model.value];
    for (const name of ["vocabulary", "width", "others"]) hide(form, name, !kind);
    hide(form, "method", Boolean(kind));
    if (kind) method.value = "all";
    const modes = Object.keys(entry.methods[method.value]);
    const hasOutput = modes[0] !== "None";
    if (changed === "model") {
      refill(task, { "": "—", ...Object.fromEntries(Object.keys(data.tasks[entry.vocabulary] || {}).map((name) => [name, name])) });
      refill(output, Object.fromEntries(modes.map((mode) => [mode, OUTPUTS[mode][0]])));
      output.value = modes[0];
    }
    const precisions = method.value === "qlora" ? BESIDE_FOUR_BITS : PRECISIONS;
    const chosen = precision.value in precisions ? precision.value : "fp32";
    refill(precision, Object.fromEntries(Object.keys(precisions).map((name) => [name, precisions[name][0]])));
    precision.value = chosen;
    hide(form, "output", !hasOutput);
    hide(form, "tokens", !hasOutput);
    hide(form, "frozen", output.value !== "frozen");
    hide(form, "task", task.options.length < 2);
    if (changed === "kept") task.value = "";
    const counted = task.value && data.tasks[entry.vocabulary][task.value];
    if (counted) form.elements.kept.value = counted[0];
    hint(form, "task", !counted ? "Of the paper: Tables 2 and 4." : counted[1] ? "Counted, special tokens included." : "About: by the paper's percentage.");
    hint(form, "precision", precisions[chosen][1]);
    hint(form, "output", OUTPUTS[output.value][1]);
    hint(form, "kept", `Of ${withCommas(rowsOfTable(form))}.`);
    form.elements.kept.max = rowsOfTable(form);
  }

  function typedKind(form) {
    const value = form.elements.model.value;
    return value.startsWith("typed:") ? value.slice("typed:".length) : null;
  }

  function rowsOfTable(form) {
    if (typedKind(form)) return form.elements.vocabulary.valueAsNumber || 0;
    const [mode] = Object.values(data.models[form.elements.model.value].methods.all);
    return mode.tables[0][0];
  }

  function refill(select, names) {
    select.replaceChildren(...options(names));
  }

  function hide(form, name, isHidden) {
    form.querySelector(`[data-field="${name}"]`).hidden = isHidden;
  }

  function hint(form, name, text) {
    form.querySelector(`#leanvocab-${name}-hint`).textContent = text;
  }

  function show(form, status, result) {
    const wrong = markWrong(form);
    if (wrong) {
      status.textContent = wrong;
      result.replaceChildren();
      return;
    }
    const estimated = estimate(data, choiceOf(form));
    const [full, partial] = [estimated.full.total_bytes, estimated.partial.total_bytes].map(formatBytes);
    const ratio = formatRatio(Math.abs(estimated.saved_ratio));
    status.textContent = `Full ${full}, partial ${partial}: ${ratio} ${estimated.saved_bytes < 0 ? "more" : "less"}.`;
    result.replaceChildren(bars(estimated), cardTable(estimated), partTable(estimated), notes(estimated, choiceOf(form)));
  }

  // Marks numbers that are none, or too small or large; the sentence of the first.
  function markWrong(form) {
    let first = "";
    for (const input of form.querySelectorAll("input")) {
      const isHidden = input.closest("[data-field]").hidden;
      const isWrong = !isHidden && (!input.checkValidity() || (input.value === "" && input.name !== "tokens"));
      input.setAttribute("aria-invalid", String(isWrong));
      const label = form.querySelector(`label[for="${input.id}"]`).textContent;
      if (isWrong && !first) first = `${label}: a whole number from 1 to ${withCommas(Number(input.max))}.`;
    }
    return first;
  }

  function choiceOf(form) {
    const its = form.elements;
    const kind = typedKind(form);
    const typed = { kind, vocabulary: its.vocabulary.valueAsNumber, width: its.width.valueAsNumber, others: its.others.valueAsNumber };
    const hasOutput = its.output.value !== "None";
    return {
      ...(kind ? typed : { model: its.model.value }),
      method: its.method.value,
      output: its.output.value,
      kept: its.kept.valueAsNumber,
      optimizer: its.optimizer.value,
      precision: its.precision.value,
      frozenRows: its.frozen.value,
      tokens: hasOutput && its.tokens.value !== "" ? its.tokens.valueAsNumber : null,
    };
  }

  const SIDES = ["full", "partial"];
  const partsOf = (estimated) => Object.keys(data.parts).filter((part) => SIDES.some((side) => estimated[side][part]));

  function bars(estimated) {
    const most = Math.max(...SIDES.map((side) => estimated[side].total_bytes));
    const rows = SIDES.map((side) => {
      const held = estimated[side];
      const there = partsOf(estimated).filter((part) => held[part]);
      const segments = there.map((part) => {
        const title = `${data.parts[part]}: ${formatBytes(held[part])}`;
        return element("span", { class: `lv-segment lv-${part}`, style: `width: ${(100 * held[part]) / most}%`, title });
      });
      const label = `${side}: ${formatBytes(held.total_bytes)}`;
      return element(
        "div",
        { class: "lv-row" },
        element("span", { class: "lv-side", "aria-hidden": "true" }, side),
        element("div", { class: "lv-bar", role: "img", "aria-label": label }, ...segments),
        element("span", { class: "lv-total", "aria-hidden": "true" }, formatBytes(held.total_bytes)),
      );
    });
    return element("div", { class: "lv-bars" }, ...rows);
  }

  // With a class, so that a theme's rules for tables without one leave it alone.
  function table(caption, head, rows) {
    const heads = head.map((text, column) => element("th", { scope: "col", class: column ? "lv-number" : "" }, text));
    const body = rows.map(([first, ...cells]) => element("tr", { class: first === "total" ? "lv-sum" : "" }, element("th", { scope: "row" }, ...[first].flat()), ...cells.map((cell) => element("td", { class: "lv-number" }, cell))));
    return element(
      "div",
      { class: "lv-table" },
      element("table", { class: "lv-parts" }, element("caption", {}, caption), element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...body)),
    );
  }

  function partTable(estimated) {
    const saved = (full, partial) => (full ? formatRatio((full - partial) / full) : "");
    const row = (first, part) => {
      const [full, partial] = SIDES.map((side) => estimated[side][part] || 0);
      return [first, formatBytes(full), formatBytes(partial), saved(full, partial)];
    };
    const parameters = SIDES.map((side) => estimated[side].num_parameters);
    const rows = partsOf(estimated).map((part) => row([element("span", { class: `lv-swatch lv-${part}`, "aria-hidden": "true" }), data.parts[part]], part));
    return table(
      "What training holds",
      ["", ...SIDES, "saved"],
      [
        ["parameters", ...parameters.map((count) => `${withCommas(count / 1e6, 1)} M`), saved(...parameters)],
        ...rows,
        row("total", "total_bytes"),
        row("vocabulary's part", "vocabulary_bytes"),
      ],
    );
  }

  function cardTable(estimated) {
    const rows = Object.keys(data.cards).map((card) => [`a card of ${card} GB`, ...SIDES.map((side) => (estimated.cards[side][card] ? "fits" : "does not fit"))]);
    return table("Cards, activations aside", ["", ...SIDES], rows);
  }

  function notes(estimated, choice) {
    const [cards, chunks] = data.notes;
    const sentences = ["Activations are not counted."];
    if (estimated.saves_little) sentences.push(data.saves_little);
    sentences.push(cards);
    if (choice.tokens !== null && choice.output !== "full") sentences.push(chunks);
    return element("ul", { class: "lv-notes" }, ...sentences.map((sentence) => element("li", {}, sentence)));
  }

  const root = document.getElementById("leanvocab-calculator");
  if (root) start(root);
})();
