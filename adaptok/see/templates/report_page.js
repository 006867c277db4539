// The page: sliders, table, chart, samples, theme.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"];
const DASHES = ["", "7 4", "2 4", "10 3 2 3", "4 2"];
const find = (id) => document.getElementById(id);

function draw() {
  const run = page.runs[state.run];
  const step = run.steps[state.step];
  find("budget").value = state.run;
  find("step").value = state.step;
  find("budget-name").textContent = run.name;
  find("step-name").textContent = step.name;
  find("budget").setAttribute("aria-valuetext", run.name);
  find("step").setAttribute("aria-valuetext", step.name);
  find("scale").hidden = state.view !== "prob";
  cards.forEach((_, sample) => drawCard(sample));
  const mean = step.tokens.reduce((sum, one) => sum + one, 0) / step.tokens.length;
  find("now").textContent =
    `Shown now: ${run.name}, ${step.name}: ${format(mean, 1)} tokens of ${cells}` +
    (step.gflops === null ? "" : `, ${format(step.gflops, 3)} GFLOPs, ${format(step.ms, 2)} ms`) +
    " per sample.";
  for (const row of find("costs").tBodies[0].rows) {
    row.setAttribute("aria-current", String(Number(row.dataset.run) === state.run));
  }
  drawChart();
}

function setRun(number) {
  state.run = number;
  state.step = Math.min(state.step, page.runs[number].steps.length - 1);
  find("step").max = page.runs[number].steps.length - 1;
  draw();
}

function fillCosts() {
  page.runs.forEach((run, number) => {
    const button = make("button", { type: "button" }, run.name);
    button.addEventListener("click", () => setRun(number));
    const figures = [
      format(run.tokens, 1), `${format((100 * run.tokens) / cells / run.passes, 1)} %`,
      run.gflops === null ? "" : format(run.gflops, 3), run.ms === null ? "" : format(run.ms, 2),
    ];
    find("costs").tBodies[0].append(
      make(
        "tr",
        { "data-run": number },
        make("th", { scope: "row" }, button),
        ...figures.map((figure) => make("td", {}, figure)),
      ),
    );
  });
}

function fillFinals() {
  if (!page.runs.some((run) => run.final)) {
    find("finals-section").hidden = true;
    return;
  }
  const head = page.samples.map((name) => make("th", { scope: "col" }, name));
  find("finals").tHead.append(make("tr", {}, make("td", {}), ...head));
  for (const run of page.runs.filter((one) => one.final)) {
    const cost = run.ms === null ? "" : `${format(run.gflops, 3)} GFLOPs, ${format(run.ms, 2)} ms`;
    const first = make(
      "th",
      { scope: "row" },
      run.name,
      make("br"),
      " ",
      make("small", {}, `${format(run.tokens, 0)} tokens`),
      make("br"),
      make("small", {}, cost),
    );
    const shown = run.final.map((number, sample) => {
      const picture = make("img", {
        src: page.pictures[number], alt: `${page.samples[sample]}, ${run.name}`,
      });
      if (!small) picture.classList.add("smooth");
      return make("td", {}, picture, make("small", {}, page.samples[sample]));
    });
    find("finals").tBodies[0].append(make("tr", {}, first, ...shown));
  }
}

const SVG = "http://www.w3.org/2000/svg";

function shape(tag, attributes, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

function shareOf(step) {
  return step.tokens.reduce((sum, one) => sum + one, 0) / step.tokens.length / cells;
}

function drawChart() {
  const most = Math.max(...page.runs.map((run) => run.steps.length));
  if (most < 2) return;
  const [height, left, bottom, top] = [240, 46, 30, 12];
  const width = Math.max(280, find("chart").clientWidth);
  const highest = Math.max(...page.runs.flatMap((run) => run.steps.map(shareOf)));
  const x = (step) => left + (step / (most - 1)) * (width - left - 12);
  const y = (share) => height - bottom - (share / (1.08 * highest)) * (height - bottom - top);
  const svg = shape("svg", {
    viewBox: `0 0 ${width} ${height}`, height, role: "img",
    "aria-label": "Share of the cells that run as tokens, by step, one line per budget",
  });
  for (const part of [0, 0.5, 1]) {
    const share = part * highest;
    svg.append(
      shape("path", { class: "axis", d: `M${left} ${y(share)}H${width - 12}` }),
      shape("text", { x: left - 8, y: y(share) + 4, "text-anchor": "end" }, `${format(100 * share, 0)} %`),
    );
  }
  page.runs.forEach((run, number) => {
    const points = run.steps.map((step, at) => `${x(at)},${y(shareOf(step))}`).join(" ");
    svg.append(
      shape("polyline", {
        points, fill: "none", stroke: COLOURS[number % COLOURS.length],
        "stroke-width": number === state.run ? 4 : 2,
        "stroke-dasharray": DASHES[number % DASHES.length],
      }),
    );
  });
  const share = shareOf(page.runs[state.run].steps[state.step]);
  svg.append(
    shape("path", { class: "here", d: `M${x(state.step)} ${top}V${height - bottom}` }),
    shape("circle", { cx: x(state.step), cy: y(share), r: 6, fill: COLOURS[state.run % COLOURS.length] }),
    shape("text", { x: left, y: height - 8 }, page.runs[0].steps[0].name),
    shape("text", { x: width - 12, y: height - 8, "text-anchor": "end" }, page.runs[0].steps.at(-1).name),
  );
  find("chart").replaceChildren(svg);
}

function fillLegend() {
  page.runs.forEach((run, number) => {
    const line = shape("line", {
      x1: 0, y1: 6, x2: 34, y2: 6, stroke: COLOURS[number % COLOURS.length], "stroke-width": 3,
      "stroke-dasharray": DASHES[number % DASHES.length],
    });
    const swatch = shape("svg", { width: 34, height: 12, "aria-hidden": "true" });
    swatch.append(line);
    find("legend").append(make("li", {}, swatch, run.name));
  });
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function nameTheme() {
  find("theme").textContent = isDark() ? "Light" : "Dark";
  find("theme").setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  find("theme").setAttribute("aria-pressed", String(isDark()));
}

function start() {
  page.samples.forEach((_, sample) => makeCard(sample));
  fillCosts();
  fillFinals();
  fillLegend();
  find("budget").max = page.runs.length - 1;
  find("budget-row").hidden = page.runs.length < 2;
  const most = Math.max(...page.runs.map((run) => run.steps.length));
  find("step-row").hidden = most < 2;
  find("chart-section").hidden = most < 2;
  find("hint").textContent =
    "Point at a cell or touch it, or reach a map with Tab and move with the arrow keys, to see " +
    "which token stands for it; all cells of that token are outlined. Hatched cells have no token.";
  if (!page.runs.some((run) => run.token.includes(NONE))) {
    find("hint").textContent = find("hint").textContent.replace(" Hatched cells have no token.", "");
  }
  state.view = page.view;
  for (const radio of document.querySelectorAll('input[name="view"]')) {
    radio.checked = radio.value === state.view;
    if (radio.value === "prob" && !hasProb) radio.parentElement.hidden = true;
    radio.addEventListener("change", () => {
      state.view = radio.value;
      draw();
    });
  }
  find("budget").addEventListener("input", (event) => setRun(Number(event.target.value)));
  find("step").addEventListener("input", (event) => {
    state.step = Number(event.target.value);
    draw();
  });
  find("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  window.addEventListener("resize", drawChart);
  nameTheme();
  setRun(Math.min(page.start[0], page.runs.length - 1));
  state.step = Math.min(page.start[1], page.runs[state.run].steps.length - 1);
  draw();
  document.documentElement.dataset.ready = "true";
}

Promise.all(pictures.map((picture) => picture.decode())).then(start, start);
