// The scan paths over a grid of tokens, walked through in step. `value` is {size, rasters: [[...]], snakes: [[...]]}.
const $ = (selector) => element.querySelector(selector);
const SVG = "http://www.w3.org/2000/svg";
const size = props.value.size;
const state = { position: size * size, playing: true };
const node = (name, attributes) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
const place = (token) => [(token % size) + 0.5, Math.floor(token / size) + 0.5];

const draw = ({ name, note }) => {
  const figure = document.createElement("figure");
  figure.className = "scan";
  const svg = node("svg", { viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": name });
  const cells = Array.from({ length: size * size }, (_, token) => {
    const [x, y] = place(token);
    const cell = node("rect", { x: x - 0.46, y: y - 0.46, width: 0.92, height: 0.92, rx: 0.1 });
    svg.append(cell);
    return cell;
  });
  const line = node("polyline", { class: "scan-line" });
  const head = node("circle", { class: "scan-head", r: 0.24 });
  svg.append(line, head);
  const caption = document.createElement("figcaption");
  const title = document.createElement("b");
  title.textContent = name;
  const small = document.createElement("span");
  small.textContent = note;
  caption.append(title, small);
  figure.append(svg, caption);
  $(".scans-grid").append(figure);
  return { cells, line, head };
};
let grids = [];
const build = () => {
  $(".scans-grid").replaceChildren();
  grids = props.value.directions.map(draw);
  show();
};

const show = () => {
  const paths = $(".scans-snake").checked ? props.value.snakes : props.value.rasters;
  grids.forEach(({ cells, line, head }, i) => {
    const walked = paths[i].slice(0, Math.max(1, state.position));
    const order = new Map(walked.map((token, position) => [token, position]));
    cells.forEach((cell, token) => {
      const share = order.has(token) ? 0.14 + (0.5 * order.get(token)) / (size * size) : 0;
      cell.style.setProperty("--share", share);
      cell.classList.toggle("walked", order.has(token));
    });
    line.setAttribute("points", walked.map((token) => place(token).join(",")).join(" "));
    const [x, y] = place(walked[walked.length - 1]);
    head.setAttribute("cx", x);
    head.setAttribute("cy", y);
  });
  $(".scans-slider").value = state.position;
};

const setPlaying = (playing) => {
  state.playing = playing;
  $(".scans-play").textContent = playing ? "Pause" : "Play";
};
$(".scans-slider").max = size * size;
$(".scans-slider").addEventListener("input", (event) => {
  setPlaying(false);
  state.position = Number(event.target.value);
  show();
});
$(".scans-play").addEventListener("click", () => setPlaying(!state.playing));
$(".scans-snake").addEventListener("change", show);
setPlaying(!matchMedia("(prefers-reduced-motion: reduce)").matches);
watch("value", build);
build();
const timer = setInterval(() => {
  if (!element.isConnected) return clearInterval(timer);
  if (!state.playing || element.offsetParent === null) return;
  state.position = state.position >= size * size + 12 ? 1 : state.position + 1; // rests a while at the end
  show();
}, 70);
