// Cards: one for each sample, with its image, its map, and what is known of a cell.
const state = { run: 0, step: 0, view: "kept", sample: -1, cell: -1 };
const cards = [];

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function makeCanvas(sample, what) {
  const canvas = make("canvas", {
    width: WIDE, height: HIGH, tabindex: 0, role: "application",
    "aria-roledescription": "token map",
    "aria-label": `${what} of ${page.samples[sample]}: arrow keys move over the cells`,
    "aria-describedby": `readout-${sample}`,
  });
  canvas.addEventListener("pointermove", (event) => choose(sample, cellAt(canvas, event)));
  canvas.addEventListener("pointerdown", (event) => choose(sample, cellAt(canvas, event)));
  canvas.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && document.activeElement !== canvas) choose(-1, -1);
  });
  canvas.addEventListener("focus", () => {
    if (canvas.matches(":focus-visible") && state.sample !== sample) {
      choose(sample, Math.floor(rows / 2) * columns + Math.floor(columns / 2));
    }
  });
  canvas.addEventListener("keydown", (event) => moveBy(sample, event));
  return canvas;
}

function cellAt(canvas, event) {
  const box = canvas.getBoundingClientRect();
  const clamp = (value, most) => Math.min(Math.max(Math.floor(value), 0), most - 1);
  const column = clamp(((event.clientX - box.left) / box.width) * columns, columns);
  return clamp(((event.clientY - box.top) / box.height) * rows, rows) * columns + column;
}

function moveBy(sample, event) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (event.key === "Escape") return choose(-1, -1);
  const jump = { Home: [0, -columns], End: [0, columns] }[event.key] || moves[event.key];
  if (!jump) return undefined;
  event.preventDefault();
  const from = state.sample === sample && state.cell >= 0 ? state.cell : 0;
  const row = Math.min(Math.max(Math.floor(from / columns) + jump[0], 0), rows - 1);
  const column = Math.min(Math.max((from % columns) + jump[1], 0), columns - 1);
  return choose(sample, row * columns + column);
}

function choose(sample, cell) {
  if (state.sample === sample && state.cell === cell) return;
  const before = state.sample;
  [state.sample, state.cell] = [sample, cell];
  for (const touched of new Set([before, sample])) if (touched >= 0) drawCard(touched);
}

function describeCell(part, cell) {
  const token = part.token[cell];
  const mark = part.mark[cell];
  const place = `Row ${Math.floor(cell / columns) + 1}, column ${(cell % columns) + 1}: `;
  const prob = probOf(mark);
  const words = prob === null ? "" : ` Keep probability ${prob.toFixed(2)}.`;
  if (token === NONE) return `${place}no token stands for this cell; it was pruned.${words}`;
  const count = countToken(part.token, token);
  const carried = count === 1 ? "this cell alone" : `${count} cells`;
  const own = isOwn(mark) ? " It has the place of this cell." : "";
  return `${place}token ${token} stands for ${carried}.${own}${words}`;
}

function makeCard(sample) {
  const count = make("span");
  const readout = make("p", { class: "readout", id: `readout-${sample}`, role: "status" });
  const given = makeCanvas(sample, "what the model is given");
  const map = makeCanvas(sample, "the map");
  const mapName = make("figcaption");
  const card = make(
    "article",
    { class: "card", "aria-label": page.samples[sample] },
    make("div", { class: "title" }, make("b", {}, page.samples[sample]), count),
    make(
      "div",
      { class: "pair" },
      make("figure", {}, given, make("figcaption", {}, page.given)),
      make("figure", {}, map, mapName),
    ),
    readout,
  );
  cards.push({ count, readout, given, map, mapName });
  document.getElementById("cards").append(card);
}

const VIEWS = {
  kept: "kept cells, others dark",
  tokens: "what each token stands for",
  prob: "keep probability",
  image: "image",
};

function drawCard(sample) {
  const run = page.runs[state.run];
  const card = cards[sample];
  const part = sliceOf(run, state.step, sample);
  const given = run.given[sample];
  const clean = run.clean ? run.clean[sample] : given;
  const left = card.given.getContext("2d");
  const right = card.map.getContext("2d");
  paintImage(left, given, state.step);
  paintMap(right, state.view, clean, state.step, part);
  if (state.sample === sample && state.cell >= 0) {
    paintChoice(left, part, state.cell);
    paintChoice(right, part, state.cell);
    card.readout.textContent = describeCell(part, state.cell);
  } else {
    card.readout.textContent = "";
  }
  const tokens = run.steps[state.step].tokens[sample];
  card.count.textContent = `${tokens} of ${cells} tokens (${format((100 * tokens) / cells, 0)} %)`;
  const seen = run.clean && state.view !== "prob" ? `${page.seen}: ` : "";
  card.mapName.textContent = seen + VIEWS[state.view];
}
