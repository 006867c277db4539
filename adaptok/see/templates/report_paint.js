// Painting: an image and its cells on a canvas.
const VIRIDIS = [
  [68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128],
  [94, 201, 98], [173, 220, 48], [253, 231, 37],
];
const EDGE = Math.max(2, Math.round(640 / Math.max(rows, columns))); // screen pixels of a cell
const WIDE = columns * EDGE;
const HIGH = rows * EDGE;
const MARK = "#E69F00";

function viridis(value) {
  const at = Math.min(Math.max(value, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const part = at - low;
  const mix = VIRIDIS[low].map((one, i) => Math.round(one + part * (VIRIDIS[low + 1][i] - one)));
  return `rgb(${mix})`;
}

// Where the picture of a step lies: all steps of a sample are in one wide picture.
function placeOf(given, step) {
  const [width, height] = page.size;
  return { picture: pictures[given.picture], left: given.still ? 0 : step * width, width, height };
}

function paintImage(pen, given, step) {
  const { picture, left, width, height } = placeOf(given, step);
  pen.imageSmoothingEnabled = !small;
  pen.drawImage(picture, left, 0, width, height, 0, 0, WIDE, HIGH);
}

// Mean colour of the cells of each token.
function meanColours(given, step, token) {
  const { picture, left, width, height } = placeOf(given, step);
  const sheet = document.createElement("canvas");
  [sheet.width, sheet.height] = [width, height];
  const pen = sheet.getContext("2d", { willReadFrequently: true });
  pen.drawImage(picture, left, 0, width, height, 0, 0, width, height);
  const bytes = pen.getImageData(0, 0, width, height).data;
  const sums = new Map();
  for (let y = 0; y < height; y += 1) {
    const row = Math.floor((y * rows) / height) * columns;
    for (let x = 0; x < width; x += 1) {
      const owner = token[row + Math.floor((x * columns) / width)];
      const at = 4 * (y * width + x);
      const sum = sums.get(owner) || [0, 0, 0, 0];
      for (let band = 0; band < 3; band += 1) sum[band] += bytes[at + band];
      sum[3] += 1;
      sums.set(owner, sum);
    }
  }
  return sums;
}

function eachCell(draw) {
  for (let cell = 0; cell < cells; cell += 1) {
    draw(cell, (cell % columns) * EDGE, Math.floor(cell / columns) * EDGE);
  }
}

function hatch(pen, x, y) {
  pen.save();
  pen.beginPath();
  pen.rect(x, y, EDGE, EDGE);
  pen.clip();
  pen.fillStyle = "#d6dae2";
  pen.fillRect(x, y, EDGE, EDGE);
  pen.strokeStyle = "#5b6475";
  pen.lineWidth = 1;
  pen.beginPath();
  for (let shift = -EDGE; shift < EDGE; shift += Math.max(5, EDGE / 4)) {
    pen.moveTo(x + shift, y + EDGE);
    pen.lineTo(x + shift + EDGE, y);
  }
  pen.stroke();
  pen.restore();
}

// Lines around the cells for which `inside` differs from a neighbour.
function outline(pen, label, colour, width) {
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.beginPath();
  eachCell((cell, x, y) => {
    if (cell % columns && label(cell) !== label(cell - 1)) {
      pen.moveTo(x, y);
      pen.lineTo(x, y + EDGE);
    }
    if (cell >= columns && label(cell) !== label(cell - columns)) {
      pen.moveTo(x, y);
      pen.lineTo(x + EDGE, y);
    }
  });
  pen.stroke();
}

function paintMap(pen, view, base, step, part) {
  paintImage(pen, base, step);
  if (view === "kept") {
    pen.fillStyle = "rgba(26, 32, 48, 0.8)";
    eachCell((cell, x, y) => {
      if (!isOwn(part.mark[cell])) pen.fillRect(x, y, EDGE, EDGE);
    });
  } else if (view === "prob") {
    eachCell((cell, x, y) => {
      pen.fillStyle = viridis(probOf(part.mark[cell]) ?? 0);
      pen.fillRect(x, y, EDGE, EDGE);
    });
  } else if (view === "tokens") {
    const sums = meanColours(base, step, part.token);
    eachCell((cell, x, y) => {
      const [red, green, blue, count] = sums.get(part.token[cell]);
      pen.fillStyle = `rgb(${red / count}, ${green / count}, ${blue / count})`;
      pen.fillRect(x, y, EDGE, EDGE);
    });
    outline(pen, (cell) => part.token[cell], "rgba(255, 255, 255, 0.9)", 5);
    outline(pen, (cell) => part.token[cell], "#1f2430", 2.2);
  }
  if (view === "kept" || view === "tokens") {
    eachCell((cell, x, y) => {
      if (part.token[cell] === NONE) hatch(pen, x, y);
    });
  }
}

// The chosen cell, and all cells that share its token.
function paintChoice(pen, part, chosen) {
  const token = part.token[chosen];
  if (token !== NONE) {
    const inside = (cell) => part.token[cell] === token;
    outline(pen, inside, "#000000", 7);
    outline(pen, inside, MARK, 4);
  }
  const x = (chosen % columns) * EDGE;
  const y = Math.floor(chosen / columns) * EDGE;
  const inset = Math.max(2, EDGE / 8);
  for (const [colour, width] of [["#000000", 6], ["#ffffff", 3]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.strokeRect(x + inset, y + inset, EDGE - 2 * inset, EDGE - 2 * inset);
  }
}
