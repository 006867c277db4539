// Data: what Python wrote, unpacked.
const page = JSON.parse(document.getElementById("data").textContent);
const [rows, columns] = page.grid;
const cells = rows * columns;
const NONE = 65535; // no token stands for a cell
const UNKNOWN = 127; // no router gave a keep probability

function unpack(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

for (const run of page.runs) {
  const bytes = unpack(run.token);
  run.token = new Uint16Array(bytes.buffer, 0, bytes.length / 2);
  run.mark = unpack(run.mark);
}

// The part of a run that belongs to one sample in one step.
function sliceOf(run, step, sample) {
  const start = (step * page.samples.length + sample) * cells;
  return {
    token: run.token.subarray(start, start + cells),
    mark: run.mark.subarray(start, start + cells),
  };
}

function isOwn(mark) {
  return mark > 127;
}

function probOf(mark) {
  const value = mark & 127;
  return value === UNKNOWN ? null : value / 100;
}

function countToken(token, wanted) {
  let count = 0;
  for (const one of token) if (one === wanted) count += 1;
  return count;
}

const pictures = page.pictures.map((source) => {
  const picture = new Image();
  picture.src = source;
  return picture;
});
const hasProb = page.runs.some((run) => run.mark.some((mark) => probOf(mark) !== null));
const small = Math.max(...page.size) < 128; // show pixels as they are

function format(value, digits) {
  return value.toLocaleString("en-US", { maximumFractionDigits: digits, minimumFractionDigits: digits });
}
