// A canvas on which a mask or a label map is painted, or boxes are drawn, with the mouse, a finger or the keyboard.
// props.value: JSON {"background": data URL, "png": data URL of the labels as grey, "boxes": [[x, y, w, h, label], ...] in 0..1}.
const root = element.querySelector(".sketch");
const canvas = root.querySelector("canvas");
const context = canvas.getContext("2d");
const said = root.querySelector(".said");
const kind = root.dataset.kind;
const width = Number(root.dataset.width);
const height = Number(root.dataset.height);
const labels = props.labels;
const colours = props.colours;
const select = root.querySelector("select");
const brush = root.querySelector("input[type=range]");
const eraser = root.querySelector("input[type=checkbox]");
const zoom = Math.max(1, Math.round(384 / Math.max(width, height)));
canvas.width = width * zoom;
canvas.height = height * zoom;

const small = document.createElement("canvas"); // one pixel a label
small.width = width;
small.height = height;
const smallContext = small.getContext("2d", { willReadFrequently: true });

let cells = new Uint8Array(width * height);
let boxes = [];
let background = "";
let picture = null;
let corner = null; // of the box that is being drawn
let cursor = { x: width / 2, y: height / 2 };
let pen = false; // whether the keyboard's pen is down
let byKeys = false;
let sent = null;
const before = [];

if (select) {
  labels.forEach((name, index) => {
    const option = document.createElement("option"); // names are a model's: text, never markup
    option.value = index;
    option.textContent = name;
    select.append(option);
  });
  if (kind === "map" && labels.length > 1) select.value = 1;
}
const chosen = () => (select ? Number(select.value) : 1);
const ink = () => (eraser && eraser.checked ? 0 : chosen());
const remember = () => {
  before.push({ cells: cells.slice(), boxes: boxes.slice() });
  if (before.length > 30) before.shift();
};

function render() {
  context.imageSmoothingEnabled = false;
  context.fillStyle = kind === "map" ? "black" : "#808080";
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (picture) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (kind !== "boxes") {
    const pixels = smallContext.createImageData(width, height);
    cells.forEach((label, i) => {
      const [r, g, b] = kind === "mask" ? [255, 255, 255] : colours[label] || [255, 255, 255];
      pixels.data.set([r, g, b, label === 0 ? 0 : picture ? 190 : 255], 4 * i);
    });
    smallContext.putImageData(pixels, 0, 0);
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
  }
  const shown = corner ? [...boxes, between(corner, cursor)] : boxes;
  context.lineWidth = 2;
  context.font = "13px sans-serif";
  shown.forEach(([x, y, w, h, label]) => {
    const [r, g, b] = colours[Math.max(0, labels.indexOf(label)) + 1] || [255, 255, 255];
    context.strokeStyle = context.fillStyle = `rgb(${r} ${g} ${b})`;
    context.strokeRect(x * canvas.width, y * canvas.height, w * canvas.width, h * canvas.height);
    context.fillText(label, x * canvas.width + 3, y * canvas.height + 14);
  });
  if (byKeys) {
    context.strokeStyle = "#e00";
    context.beginPath();
    context.arc(cursor.x * zoom, cursor.y * zoom, Math.max(4, (radius() + 0.5) * zoom), 0, 2 * Math.PI);
    context.stroke();
  }
}

const radius = () => (brush ? Number(brush.value) / 2 : 0);

function dab(x, y) {
  const r = radius();
  for (let j = Math.max(0, Math.ceil(y - r - 0.5)); j < Math.min(height, y + r + 0.5); j++) {
    for (let i = Math.max(0, Math.ceil(x - r - 0.5)); i < Math.min(width, x + r + 0.5); i++) {
      if ((i + 0.5 - x) ** 2 + (j + 0.5 - y) ** 2 <= (r + 0.25) ** 2) cells[j * width + i] = ink();
    }
  }
}

function stroke(from, to) {
  const steps = Math.max(1, Math.ceil(Math.hypot(to.x - from.x, to.y - from.y)));
  for (let k = 0; k <= steps; k++) {
    dab(from.x + ((to.x - from.x) * k) / steps, from.y + ((to.y - from.y) * k) / steps);
  }
}

function between(a, b) {
  const [x, y] = [Math.min(a.x, b.x) / width, Math.min(a.y, b.y) / height];
  return [x, y, Math.abs(a.x - b.x) / width, Math.abs(a.y - b.y) / height, labels[chosen()] ?? ""];
}

function finishBox() {
  const box = between(corner, cursor);
  corner = null;
  if (box[2] * width >= 1 && box[3] * height >= 1) {
    boxes = [...boxes, box.map((v) => (typeof v === "number" ? Number(v.toFixed(4)) : v))];
    said.textContent = `${boxes.length} boxes; the last: ${box[4]}`;
    send();
  } else before.pop();
  render();
}

function send() {
  let png = "";
  if (kind !== "boxes" && cells.some((label) => label)) {
    const pixels = smallContext.createImageData(width, height);
    cells.forEach((label, i) => {
      const grey = kind === "mask" ? 255 * label : label;
      pixels.data.set([grey, grey, grey, 255], 4 * i);
    });
    smallContext.putImageData(pixels, 0, 0);
    png = small.toDataURL("image/png");
  }
  sent = JSON.stringify({ background, png, boxes });
  props.value = sent;
  trigger("input");
}

function load() {
  if (props.value === sent) return;
  sent = props.value;
  const value = JSON.parse(sent || "{}");
  cells.fill(0);
  boxes = value.boxes || [];
  if (value.background !== background) {
    background = value.background || "";
    picture = null;
    if (background.startsWith("data:image/")) {
      const image = new Image();
      image.onload = () => {
        picture = image;
        render();
      };
      image.src = background;
    }
  }
  if ((value.png || "").startsWith("data:image/png")) {
    const image = new Image();
    image.onload = () => {
      smallContext.drawImage(image, 0, 0, width, height);
      const data = smallContext.getImageData(0, 0, width, height).data;
      cells = cells.map((_, i) => (kind === "mask" ? Number(data[4 * i] > 127) : data[4 * i]));
      render();
    };
    image.src = value.png;
  }
  render();
}

// Mouse, pen and fingers
const at = (event) => {
  const frame = canvas.getBoundingClientRect();
  const x = ((event.clientX - frame.left) / frame.width) * width;
  const y = ((event.clientY - frame.top) / frame.height) * height;
  return { x: Math.min(width, Math.max(0, x)), y: Math.min(height, Math.max(0, y)) };
};
let down = false;
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  [down, byKeys, cursor] = [true, false, at(event)];
  remember();
  if (kind === "boxes") corner = cursor;
  else dab(cursor.x, cursor.y);
  render();
});
canvas.addEventListener("pointermove", (event) => {
  if (!down) return;
  const from = cursor;
  cursor = at(event);
  if (kind !== "boxes") stroke(from, cursor);
  render();
});
const up = () => {
  if (!down) return;
  down = false;
  if (kind === "boxes") finishBox();
  else send();
};
canvas.addEventListener("pointerup", up);
canvas.addEventListener("pointercancel", up);

// Keys
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
canvas.addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  if (!move && ![" ", "Enter", "Escape", "Delete", "Backspace"].includes(event.key) && event.key !== "z") return;
  if (event.key === "z") {
    if (event.ctrlKey || event.metaKey) undo();
    return;
  }
  event.preventDefault();
  byKeys = true;
  if (move) {
    const step = event.shiftKey ? 1 : Math.max(1, Math.round(width / 32));
    const from = cursor;
    const clamp = (v, most) => Math.min(most, Math.max(0, v));
    cursor = { x: clamp(cursor.x + move[0] * step, width), y: clamp(cursor.y + move[1] * step, height) };
    if (pen) stroke(from, cursor);
    said.textContent = `${Math.round(cursor.x)}, ${Math.round(cursor.y)} of ${width}, ${height}`;
  } else if (kind === "boxes") {
    if (event.key === "Escape" || event.key === "Delete" || event.key === "Backspace") {
      if (!corner && event.key !== "Escape" && boxes.length) {
        remember();
        boxes = boxes.slice(0, -1);
        said.textContent = `${boxes.length} boxes`;
        send();
      }
      corner = null;
    } else if (corner) finishBox();
    else {
      remember();
      corner = cursor;
      said.textContent = "first corner; move, then Enter";
    }
  } else if (event.key === "Enter" || event.key === "Escape") {
    if (pen) send();
    else if (event.key === "Enter") {
      remember();
      dab(cursor.x, cursor.y);
    }
    pen = !pen && event.key === "Enter";
    said.textContent = pen ? "the pen is down" : "the pen is up";
  } else if (event.key === " ") {
    remember();
    dab(cursor.x, cursor.y);
    send();
  }
  render();
});
canvas.addEventListener("blur", () => {
  if (pen) send();
  pen = byKeys = false;
  corner = down ? corner : null;
  render();
});

function undo() {
  const last = before.pop();
  if (!last) return;
  ({ cells, boxes } = last);
  send();
  render();
}
root.querySelector(".undo").addEventListener("click", undo);
root.querySelector(".clear").addEventListener("click", () => {
  remember();
  cells = new Uint8Array(width * height);
  boxes = [];
  send();
  render();
});

watch("value", load);
load();
