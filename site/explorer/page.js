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

function addThumbnails(asked) {
  const groups = Map.groupBy(DATA.examples, (example) => example.group);
  for (const [group, members] of groups) {
    const thumbs = members.map((example) => {
      const input = element("input", { type: "radio", name: "image", value: DATA.examples.indexOf(example) });
      const name = DATA.classes[example.target];
      return element("label", { class: "thumb", title: name }, input,
        element("img", { src: `data:image/png;base64,${example.png}`, alt: `${name}, image ${example.index}` }));
    });
    $("images").append(element("fieldset", {}, element("legend", {}, group), element("div", {}, ...thumbs)));
  }
  const swapDiffers = DATA.examples.findIndex(({ logits, target }) => classesAbove(logits, target).length > 1);
  $("look").elements.image.value = DATA.examples[asked.get("image")] ? asked.get("image") : swapDiffers;
  $("temperature").value = asked.get("temperature") ?? 4;
}

function showExample() {
  const { logits, target, png, index } = DATA.examples[$("look").elements.image.value];
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

const title = (method) => DATA.titles[method] ?? method;
const filters = $("filters").elements;

/** Colour by repair, as in sortkd.evidence.plots; dashes by objective: no two methods look the same. */
const COLOURS = { "": "grey-line", sort: "sort", swap: "swap", revise: "revise", loca: "loca", mft: "mft", smooth: "smooth", skip: "skip" };
const DASHES = ["", "2,3", "8,3", "8,3,2,3", "14,3", "5,2", "14,3,2,3", "2,6", "8,2,2,2,2,2", "14,3,5,3"];
const OBJECTIVES = [...new Set(["kd", "ce", ...Object.keys(DATA.titles).map((name) => name.split("+")[0])])];
function lineOf(method) {
  const [objective, repair = ""] = method.split("+");
  return { colour: COLOURS[repair] ?? "ink", dash: DASHES[OBJECTIVES.indexOf(objective) % DASHES.length] };
}

/** Give a select these values, and keep the wanted one if it is among them. */
function fillSelect(select, values, wanted, text = String) {
  select.replaceChildren(...values.map((value) => element("option", { value }, text(value))));
  select.value = values.includes(wanted) ? wanted : values[0];
}

/** A checkbox for each method, which is also the legend. */
function fillMethods(names, wanted) {
  if ([...document.getElementsByName("method")].map((box) => box.value).join() === names.join()) return; // a box that is clicked keeps its focus
  const usual = names.filter((name) => ["ce", "kd", "kd+sort"].includes(name));
  const checked = [wanted, usual, names].find((some) => names.some((name) => some.includes(name)));
  $("methods").replaceChildren(...names.map((name) => {
    const { colour, dash } = lineOf(name), label = element("label", { class: "check" });
    label.innerHTML = `<input type="checkbox" name="method"><svg><line x2="30" y1="5" y2="5" stroke="var(--${colour})" stroke-dasharray="${dash}"/></svg>`;
    Object.assign(label.firstChild, { value: name, checked: checked.includes(name) });
    label.append(title(name));
    return label;
  }));
}

/** The setting that is asked for: each filter has only values that exist with those before it, so there is always one. */
function chooseSetting(asked) {
  let settings = DATA.settings;
  for (const name of ["teacher", "data", "epochs"]) {
    fillSelect(filters[name], [...new Set(settings.map((setting) => setting[name]))], asked.get(name));
    settings = settings.filter((setting) => setting[name] === filters[name].value);
  }
  const names = settings[0].lines.map((line) => line.method), compared = [asked.get("first"), asked.get("second")];
  fillMethods(names, asked.getAll("method"));
  const usual = settings[0].effects[0]?.comparison.split(" minus ") ?? names;
  const [first, second] = compared.every((name) => names.includes(name)) ? compared : usual;
  fillSelect(filters.first, names, first, title);
  fillSelect(filters.second, names, second, title);
  filters.runs.checked = asked.has("runs");
  return settings[0];
}

function draw(id, traces, xTitle, yTitle, more) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), automargin: true, fixedrange: innerWidth < 640 }; // where a finger scrolls
  Plotly.react(id, traces, {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { color: colour("ink"), family: "system-ui, sans-serif" }, hovermode: "closest",
    hoverlabel: { bgcolor: colour("paper"), font: { color: colour("ink") } }, margin: { l: 10, r: 10, t: 10, b: 40 }, showlegend: false, ...more,
    xaxis: { ...axis, title: { text: xTitle }, ...more.xaxis }, yaxis: { ...axis, title: { text: yTitle }, ...more.yaxis },
  }, { displayModeBar: false, responsive: true });
}

function showCurves(lines) {
  const each = filters.runs.checked, epochs = (values) => values.map((_, i) => i + 1), back = (values) => [...values].reverse();
  const traces = lines.flatMap(({ method, mean, half, count, runs }) => {
    const { dash, ...line } = lineOf(method), color = colour(line.colour), name = title(method), x = epochs(mean);
    const band = half.length ? [{ x: [...x, ...back(x)], y: [...mean.map((y, i) => y + half[i]), ...back(mean.map((y, i) => y - half[i]))],
      fill: "toself", fillcolor: color, opacity: 0.2, mode: "none", hoverinfo: "skip" }] : [];
    const single = each ? runs.map(({ seed, top1, plan }) => ({ x: epochs(top1), y: top1, mode: "lines", line: { color, width: 1 }, opacity: 0.4,
      hovertemplate: `${name}, seed ${seed}${plan && `, ${plan}`}<br>epoch %{x}: %{y:.2f} %<extra></extra>` })) : [];
    return [...band, ...single, { x, y: mean, mode: "lines", line: { color, dash: dash ? dash.replace(/\d+/g, "$&px") : "solid", width: 2.5 }, customdata: half,
      hovertemplate: `<b>${name}</b>, mean of ${count} seeds<br>epoch %{x}: %{y:.2f} %${half.length ? " ± %{customdata:.2f}" : ""}<extra></extra>` }];
  });
  const longest = Math.max(...lines.map(({ mean }) => mean.length));
  draw("curves", traces, "epoch", "test accuracy (%)", { height: 400, xaxis: { dtick: longest > 10 ? undefined : 1 } });
  const rows = lines.flatMap(({ method, runs }) => runs.map((run) =>
    [title(method), String(run.seed), run.last_top1.toFixed(2) + (run.diverged ? " (diverged)" : ""), run.best_top1.toFixed(2), run.plan]));
  fillTable($("runs"), ["method", "seed", "last epoch (%)", "best epoch (%)", "plan"], rows);
}

function tellEffect(effect) {
  if (effect.reason) return element("p", {}, `${effect.reason[0].toUpperCase()}${effect.reason.slice(1)}`);
  const [first, second] = effect.comparison.split(" minus ").map(title);
  const interval = effect.low === null ? "no interval from one seed"
    : `${Math.round(100 * effect.level)} % interval ${signed(effect.low)} to ${signed(effect.high)}`;
  return element("p", {}, `${first} minus ${second}: `, element("b", {}, signed(effect.mean)), ` points (n = ${effect.seeds}${effect.plan && ` of ${effect.planned}`}, ${interval}), `,
    element("i", {}, effect.verdict), ". ", element("span", { class: "mark" }, effect.plan ? `planned: ${effect.plan}` : "not planned"));
}

function showEffects(found) {
  const methods = [filters.first.value, filters.second.value].sort();
  const told = found.filter((effect) => effect.methods.every((name, i) => name === methods[i])), effects = told.filter((effect) => !effect.reason);
  const none = methods[0] === methods[1] ? "Choose two different methods." : "No seed has both methods here.";
  $("verdicts").replaceChildren(...(told.length ? told.map(tellEffect) : [element("p", {}, none)]));
  $("effects").hidden = !effects.length;
  if (!effects.length) return;
  const rows = effects.map((_, i) => i), widest = effects[0].smallest_effect;
  draw("effects", [
    { x: effects.flatMap((effect) => effect.differences), y: effects.flatMap((effect, i) => effect.differences.map(() => i)), mode: "markers",
      marker: { symbol: "circle-open", color: colour("grey-line"), size: 8 }, hovertemplate: "one seed: %{x:+.2f}<extra></extra>" },
    { x: effects.map((effect) => effect.mean), y: rows, mode: "markers", marker: { color: colour("sort"), size: 11, symbol: "diamond" },
      error_x: { type: "data", symmetric: false, array: effects.map(({ high, mean }) => high === null ? 0 : high - mean),
        arrayminus: effects.map(({ low, mean }) => low === null ? 0 : mean - low), color: colour("sort"), thickness: 2 }, hoverinfo: "x" },
  ], `${effects[0].comparison.split(" minus ").map(title).join(" minus ")} (points)`, "", {
    height: 80 + 60 * effects.length, xaxis: { zeroline: true, zerolinecolor: colour("soft") }, yaxis: { range: [effects.length - 0.5, -0.5], visible: false },
    shapes: [{ type: "rect", yref: "paper", x0: -widest, x1: widest, y0: 0, y1: 1, fillcolor: colour("plain"), opacity: 0.2, line: { width: 0 }, layer: "below" }],
  });
}

function showResults(asked) {
  const { lines, effects } = chooseSetting(asked), wanted = chosen().getAll("method");
  showCurves(lines.filter(({ method }) => wanted.includes(method)));
  showEffects(effects);
}

// The address holds what was chosen, so that a link shows the same --------------------------------------------------------------

const chosen = () => new URLSearchParams([...new FormData($("look")), ...new FormData($("filters"))]);
const keep = () => history.replaceState(null, "", `?${chosen()}${location.hash}`);

const asked = new URLSearchParams(location.search);
addThumbnails(asked);
showExample();
tellSource();
showResults(asked);
$("waiting").textContent = DATA.waiting.length ? `Not shown before the look that they plan: ${DATA.waiting.join(", ")}.` : "";
$("look").addEventListener("input", () => { showExample(); keep(); });
$("filters").addEventListener("change", () => { showResults(chosen()); keep(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => showResults(chosen()));
