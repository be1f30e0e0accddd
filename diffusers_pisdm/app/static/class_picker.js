// Classes to pick by typing, by style, by subject and by picture. `value` is the list of chosen labels.
const $ = (selector) => element.querySelector(selector);
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const state = { style: "", subject: "", shownFor: null, chosenFor: null };

const parts = (label) => {
  const slash = label.indexOf("/");
  return slash < 0 ? ["", label] : [label.slice(0, slash), label.slice(slash + 1)];
};
const unique = (list) => [...new Set(list)].filter(Boolean).sort();

const thumbnail = (index, label) => {
  const picture = make("span", "picker-picture");
  if (props.sheet) {
    const rows = Math.ceil(props.labels.length / props.columns);
    const share = (position, count) => (count > 1 ? (100 * position) / (count - 1) : 0);
    picture.style.backgroundImage = `url("${props.sheet}")`;
    picture.style.backgroundSize = `${100 * props.columns}% ${100 * rows}%`;
    picture.style.backgroundPosition =
      `${share(index % props.columns, props.columns)}% ${share(Math.floor(index / props.columns), rows)}%`;
  } else {
    const characters = [...new Intl.Segmenter().segment(parts(label)[1])]; // as read: an emoji is many code units
    picture.textContent = characters.slice(0, 2).map(({ segment }) => segment).join("");
  }
  return picture;
};

const chosen = () => props.value || [];
const choose = (labels) => {
  props.value = labels;
  trigger("input");
  show();
};
const toggle = (label) =>
  choose(chosen().includes(label) ? chosen().filter((other) => other !== label) : [...chosen(), label]);

const showFilters = () => {
  const styles = unique(props.labels.map((label) => parts(label)[0]));
  const bar = $(".picker-styles");
  bar.hidden = styles.length < 2;
  bar.replaceChildren(...["", ...styles].map((style) => {
    const button = make("button", "picker-style", style || "All styles");
    button.type = "button";
    button.setAttribute("aria-pressed", style === state.style);
    button.onclick = () => { state.style = style; showFilters(); showTiles(); };
    return button;
  }));
  const subjects = unique(props.labels.map((label) => parts(label)[1]));
  const select = $(".picker-subject");
  select.hidden = styles.length < 2;
  select.replaceChildren(...["", ...subjects].map((subject) => new Option(subject || "All subjects", subject)));
  select.value = state.subject;
};

const showTiles = () => {
  const words = $(".picker-search").value.toLowerCase().split(/[\s,]+/).filter(Boolean);
  const matches = (label, index) => {
    const [style, subject] = parts(label);
    return (!state.style || style === state.style) && (!state.subject || subject === state.subject)
      && words.every((word) => label.toLowerCase().includes(word) || word === String(index));
  };
  const shown = props.labels.map((label, index) => [label, index]).filter(([label, index]) => matches(label, index));
  const isOneSubject = unique(shown.map(([label]) => parts(label)[1])).length === 1; // then the style tells them apart
  const tiles = shown.map(([label, index]) => {
    const [style, subject] = parts(label);
    const tile = make("button", "picker-tile");
    tile.type = "button";
    tile.title = `${label} (class ${index})`;
    tile.dataset.label = label;
    tile.setAttribute("aria-pressed", chosen().includes(label));
    tile.append(thumbnail(index, label), make("span", "picker-name", (isOneSubject && style) || subject));
    tile.onclick = () => toggle(label);
    return tile;
  });
  $(".picker-grid").replaceChildren(...tiles);
  $(".picker-count").textContent =
    tiles.length ? `${tiles.length} of ${props.labels.length} classes` : "No class has these words in its name.";
};

const showChosen = () => {
  $(".picker-chosen").replaceChildren(...chosen().map((label) => {
    const chip = make("button", "picker-chip");
    chip.type = "button";
    chip.title = "Remove";
    const index = props.labels.indexOf(label);
    if (index >= 0) chip.append(thumbnail(index, label));
    chip.append(make("span", "", label), make("span", "picker-cross", "×"));
    chip.onclick = () => toggle(label);
    return chip;
  }));
  $(".picker-none").hidden = chosen().length > 0;
};

const show = () => {
  const shownFor = JSON.stringify([props.sheet, props.labels]);
  if (state.shownFor !== shownFor) {
    Object.assign(state, { shownFor, style: "", subject: "" });
    showFilters();
    showTiles();
  }
  for (const tile of element.querySelectorAll(".picker-tile")) {
    tile.setAttribute("aria-pressed", chosen().includes(tile.dataset.label));
  }
  showChosen();
};

$(".picker-search").addEventListener("input", showTiles);
$(".picker-search").addEventListener("keydown", (event) => {
  const first = $(".picker-tile");
  if (event.key === "Enter" && first) choose([first.dataset.label]);
});
$(".picker-subject").addEventListener("change", (event) => {
  state.subject = event.target.value;
  showTiles();
});
watch(["value", "labels", "sheet"], show);
show();
