// The page: what was chosen, and what it shows. All numbers of runs and effects come from data.js, which sortkd computed.

const $ = (id) => document.getElementById(id);

/** An element with attributes and children; text is never read as HTML. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function fillTable(table, header, rows) {
  const line = (cells, tag) => element("tr", {}, ...cells.map((cell) => element(tag, {}, cell)));
  table.replaceChildren(element("thead", {}, line(header, "th")), element("tbody", {}, ...rows.map((cells) => line(cells, "td"))));
}

const percent = (share, digits) => `${(100 * share).toFixed(digits)}\u00a0%`;
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const ordinal = (n) => n + (["th", "st", "nd", "rd"][n % 100 - n % 10 === 10 ? 0 : n % 10] ?? "th");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// The mechanism ------------------------------------------------------------------------------------------------------------

function addThumbnails() {
  const groups = Map.groupBy(DATA.examples, (example) => example.group);
  for (const [group, members] of groups) {
    const thumbs = members.map((example) => {
      const input = element("input", { type: "radio", name: "image", autocomplete: "off", value: DATA.examples.indexOf(example) });
      const name = DATA.classes[example.target];
      return element("label", { class: "thumb", title: name }, input,
        element("img", { src: `data:image/png;base64,${example.png}`, alt: `${name}, image ${example.index}` }));
    });
    $("images").append(element("fieldset", {}, element("legend", {}, group), element("div", {}, ...thumbs)));
  }
  $("images").addEventListener("change", showExample);
  $("temperature").addEventListener("input", showExample);
  const swapDiffers = DATA.examples.findIndex(({ logits, target }) => classesAbove(logits, target).length > 1);
  document.querySelector(`[name=image][value="${swapDiffers}"]`).checked = true;
}

function showExample() {
  const { logits, target, png, index } = DATA.examples[document.querySelector("[name=image]:checked").value];
  const temperature = Number($("temperature").value);
  const above = classesAbove(logits, target);
  const repaired = Object.values(REPAIRS).map((repair) => repair(logits, target));
  const probabilities = repaired.map((values) => softmax(values, temperature));
  const shown = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b).slice(0, 10);
  if (!shown.includes(target)) shown.push(target);

  $("temperature-value").value = temperature.toFixed(1);
  $("picture").src = `data:image/png;base64,${png}`;
  $("picture").alt = `The image, of the class ${DATA.classes[target]}`;
  $("caption").textContent = `${DATA.classes[target]}, training image ${index}`;
  $("story").replaceChildren(...tellStory(above, target, probabilities[0]));

  const longest = Math.max(...probabilities.flat());
  $("bars").replaceChildren(...shown.map((k) => element("tr", k === target ? { class: "target" } : {},
    element("th", { scope: "row" }, DATA.classes[k]),
    ...probabilities.map((p) => element("td", {}, element("span", { class: "bar", style: `--length: ${p[k] / longest}` }),
      element("span", { class: "value" }, percent(p[k], 2)))))));
  const numbers = {
    "target's rank": (p, values) => rankOf(values, target),
    "target's probability": (p) => percent(p[target], 2),
    "entropy (nats)": (p) => entropy(p).toFixed(3),
    "total variation from plain": (p) => totalVariation(p, probabilities[0]).toFixed(3),
  };
  $("numbers").replaceChildren(...Object.entries(numbers).map(([name, number]) => element("tr", {},
    element("th", { scope: "row" }, name), ...probabilities.map((p, i) => element("td", {}, String(number(p, repaired[i])))))));
}

function tellStory(above, target, p) {
  const bold = (k) => element("b", k === target ? { class: "target" } : {}, DATA.classes[k]);
  if (!above.length) return ["The teacher is right: ", bold(target), " comes first. Nothing is repaired, and all four columns are the same to the bit."];
  const others = above.length === 1 ? "which takes the target's: with one class above the target, sorting is swapping"
    : `and each of the ${above.length} classes above it takes the value one place below`;
  return ["The teacher says ", bold(above[0]), ` (${percent(p[above[0]], 1)} at this temperature); the target `, bold(target),
    ` is ${ordinal(above.length + 1)} (${percent(p[target], 1)}). Sorting gives `, bold(target), " the value of ", bold(above[0]),
    `, ${others}. The other ${DATA.classes.length - above.length - 1} classes keep theirs, and the entropy stays.`];
}

function tellSource() {
  const { file, sha256, architecture, epochs, top1 } = DATA.teacher;
  $("source").textContent = `The teacher is ${file}: ${architecture}, ${epochs} epochs, ${top1} % on the test images of CIFAR-100 (SHA-256 ${sha256.slice(0, 16)}…). `
    + `It gets ${DATA.wrong.toLocaleString("en")} of the first ${DATA.images.toLocaleString("en")} training images wrong. Shown are the first of each group whose class was not shown `
    + "before, without augmentation; logits are rounded to float16. The browser computes the rest.";
}

// The results --------------------------------------------------------------------------------------------------------------

const FILTERS = { pair: "pair_title", length: "length", method: "method", seed: "seed", plan: "plan" };
const ANY = "any";
const title = (method) => DATA.titles[method] ?? method;

function fillSelect(select, values, text = String, any = true) {
  const options = values.map((value) => element("option", { value }, text(value)));
  select.replaceChildren(...(any ? [element("option", { value: ANY }, ANY)] : []), ...options);
}

function addFilters() {
  const distinct = (name) => [...new Set(DATA.runs.map((run) => run[name]))].sort((a, b) => (a > b) - (a < b));
  for (const [id, name] of Object.entries(FILTERS)) {
    fillSelect($(id), distinct(name), id === "method" ? title : id === "plan" ? (plan) => plan || "not planned" : String);
  }
  const methods = Object.keys(DATA.titles);
  for (const id of ["first", "second"]) fillSelect($(id), methods, title, false);
  const start = DATA.effects.find((effect) => effect.comparison === "kd+sort minus kd") ?? DATA.effects[0];
  if (start) [$("first").value, $("second").value] = start.comparison.split(" minus ");
  $("filters").addEventListener("change", () => { showRuns(); showEffects(); });
  $("comparison").addEventListener("change", showEffects);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { showRuns(); showEffects(); });
}

const fits = (row, ids) => ids.every((id) => $(id).value === ANY || String(row[FILTERS[id]]) === $(id).value);
const planned = (plan) => element("span", { class: plan ? "mark planned" : "mark" }, plan ? `planned: ${plan}` : "not planned");

function draw(id, traces, xTitle, yTitle, more = {}) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), automargin: true };
  const layout = {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { color: colour("ink"), family: "system-ui, sans-serif" }, hovermode: "closest",
    hoverlabel: { bgcolor: colour("paper"), font: { color: colour("ink") } }, margin: { l: 10, r: 10, t: 10, b: 40 },
    legend: { orientation: "h", y: -0.2 }, ...more,
    xaxis: { ...axis, title: { text: xTitle }, ...more.xaxis }, yaxis: { ...axis, title: { text: yTitle }, ...more.yaxis },
  };
  $(id).classList.remove("empty");
  Plotly.react(id, traces, layout, { displayModeBar: false, responsive: true });
}

function showNothing(id, text) {
  Plotly.purge(id);
  $(id).classList.add("empty");
  $(id).textContent = text;
}

/** Colour by repair, as in sortkd.evidence.plots; dashes by objective. */
function lineOf(method) {
  const [objective, repair] = method.split("+");
  const objectives = [...new Set(["kd", ...Object.keys(DATA.titles).map((name) => name.split("+")[0])])];
  const dash = ["solid", "dot", "dash", "dashdot", "longdash"][objectives.indexOf(objective) % 5];
  return { color: colour(!repair ? "grey-line" : { sort: "sort", swap: "swap" }[repair] ?? "ink"), dash, width: 1.5 };
}

function showRuns() {
  const runs = DATA.runs.filter((run) => fits(run, Object.keys(FILTERS)));
  $("count").textContent = `${runs.length} of ${DATA.runs.length} runs`;
  fillTable($("runs"), ["pair", "method", "seed", "last epoch (%)", "best epoch (%)", "length", "plan"], runs.map((run) => [
    run.pair_title, title(run.method), String(run.seed), run.last_top1.toFixed(2) + (run.diverged ? " (diverged)" : ""), run.best_top1.toFixed(2), run.length, planned(run.plan)]));
  if (!runs.length) return showNothing("curves", "No run fits all of these filters. Set one of them back to “any”.");
  const named = new Set(), epochs = Math.max(...runs.map((run) => run.curve.epoch.length));
  draw("curves", runs.map((run) => ({
    x: run.curve.epoch, y: run.curve.test_top1, mode: "lines", line: lineOf(run.method), opacity: 0.75, name: title(run.method), legendgroup: run.method,
    showlegend: !named.has(run.method) && Boolean(named.add(run.method)),
    hovertemplate: `<b>${title(run.method)}</b>, seed ${run.seed}<br>epoch %{x}: %{y:.2f} %<br>${run.pair_title}<br>${run.length}<br>${run.plan || "not planned"}<extra></extra>`,
  })), "epoch", "test accuracy (%)", { height: 420, xaxis: { dtick: epochs > 10 ? undefined : 1 } });
}

function showEffects() {
  const methods = [$("first").value, $("second").value].sort();
  const found = DATA.effects.filter((effect) => effect.methods.every((name, i) => name === methods[i]) && fits(effect, ["pair", "length"]));
  const effects = found.filter((effect) => effect.reason === null);
  const known = [...new Set(DATA.effects.filter((effect) => effect.reason === null).map((effect) => effect.methods.map(title).join(" with ")))];
  const why = methods[0] === methods[1] ? ["Choose two different methods."]
    : found.length ? found.flatMap((effect) => effect.reason ?? [])
      : [`No seed has both ${methods.map(title).join(" and ")} here yet. These can be compared: ${known.join("; ")}.`];
  for (const id of ["effects", "effect-table"]) $(id).hidden = !effects.length;
  $("no-effect").hidden = !why.length;
  $("no-effect").replaceChildren(...why.map((line) => element("div", {}, line)));
  if (!effects.length) return;
  const [first, second] = effects[0].comparison.split(" minus ").map(title);
  const interval = (effect) => effect.low === null ? "none from one seed" : `${signed(effect.low)}\u00a0to\u00a0${signed(effect.high)} (${Math.round(100 * effect.level)}\u00a0%)`;
  const seeds = (effect) => effect.plan ? `${effect.seeds} of ${effect.planned}` : String(effect.seeds);
  fillTable($("effect-table"), ["difference", "interval", "seeds", "verdict", "plan", "pair", "length", "teacher"], effects.map((effect) => [
    element("b", {}, signed(effect.mean)), interval(effect), seeds(effect), effect.verdict, planned(effect.plan), effect.pair_title, effect.length, effect.teacher_file]));
  const rows = effects.map((effect, i) => i);
  const names = effects.map((effect, y) => ({ x: 0, xref: "paper", xanchor: "left", y: y - 0.35, showarrow: false, font: { size: 12 },
    text: `${effect.pair_title}, ${effect.length.split(":")[0]}, ${effect.plan ? "planned" : "not planned"}` }));
  const widest = effects[0].smallest_effect;
  draw("effects", [
    { x: effects.flatMap((effect) => effect.differences), y: effects.flatMap((effect, i) => effect.differences.map(() => i)), mode: "markers",
      marker: { symbol: "circle-open", color: colour("grey-line"), size: 8 }, hovertemplate: "one seed: %{x:+.2f}<extra></extra>" },
    { x: effects.map((effect) => effect.mean), y: rows, mode: "markers", marker: { color: colour("sort"), size: 11, symbol: "diamond" },
      error_x: { type: "data", symmetric: false, array: effects.map(({ high, mean }) => high === null ? 0 : high - mean),
        arrayminus: effects.map(({ low, mean }) => low === null ? 0 : mean - low), color: colour("sort"), thickness: 2 },
      hovertemplate: effects.map((effect) => `<b>${signed(effect.mean)}</b>, ${interval(effect)}<br>${seeds(effect)} seeds, ${effect.verdict}<extra></extra>`) },
  ], `${first} minus ${second} (points)`, "", {
    height: 80 + 90 * effects.length, showlegend: false, annotations: names, xaxis: { zeroline: true, zerolinecolor: colour("soft") },
    yaxis: { range: [effects.length - 0.5, -0.5], visible: false },
    shapes: [{ type: "rect", yref: "paper", x0: -widest, x1: widest, y0: 0, y1: 1, fillcolor: colour("plain"), opacity: 0.2, line: { width: 0 }, layer: "below" }],
  });
}

function tellPlans() {
  fillTable($("plans"), ["plan", "question", "methods", "planned", "exist"], DATA.plans.map((row) =>
    [row.plan, DATA.questions[row.plan] ?? "", row.methods.split(", ").map(title).join(", "), String(row.planned), String(row.exist)]));
  if (DATA.left_out.length) {
    $("left-out").textContent = "Left out: " + DATA.left_out.map((line) => `${line.file}, line ${line.line}: ${line.reason}`).join("; ") + ".";
  }
}

addThumbnails();
showExample();
tellSource();
addFilters();
showRuns();
showEffects();
tellPlans();
