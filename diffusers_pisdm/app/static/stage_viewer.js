// A picture's way through the cascade. `value` is {pictures: [{label, frames: [{size, step, steps, src}]}]}.
const $ = (selector) => element.querySelector(selector);
const state = { picture: 0, frame: 0, timer: null };
const frames = () => props.value?.pictures?.[state.picture]?.frames || [];

const showFrame = (index) => {
  const all = frames();
  if (!all.length) return;
  state.frame = Math.max(0, Math.min(index, all.length - 1));
  const { size, step, steps, src } = all[state.frame];
  $(".viewer-picture").src = src;
  $(".viewer-picture").classList.toggle("pixels", size < 128);
  $(".viewer-slider").value = state.frame;
  $(".viewer-caption").textContent = `${size} × ${size} pixels, step ${step} of ${steps}`;
  for (const button of element.querySelectorAll(".viewer-stage")) {
    button.setAttribute("aria-pressed", Number(button.dataset.size) === size);
  }
};

const stop = () => {
  clearInterval(state.timer);
  state.timer = null;
  $(".viewer-play").textContent = "Play";
};
const play = () => {
  if (state.timer) return stop();
  if (state.frame === frames().length - 1) showFrame(0);
  $(".viewer-play").textContent = "Pause";
  state.timer = setInterval(() => {
    if (state.frame >= frames().length - 1) stop();
    else showFrame(state.frame + 1);
  }, 120);
};

const showPicture = (index) => {
  state.picture = index;
  const all = frames();
  $(".viewer-slider").max = Math.max(0, all.length - 1);
  const ends = all.flatMap((frame, i) => (i === all.length - 1 || all[i + 1].size !== frame.size ? [i] : []));
  $(".viewer-stages").replaceChildren(...ends.map((i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "viewer-stage";
    button.dataset.size = all[i].size;
    const image = new Image();
    image.src = all[i].src;
    image.alt = `Stage of ${all[i].size} pixels`;
    image.className = all[i].size < 128 ? "pixels" : "";
    const name = document.createElement("span");
    name.textContent = `${all[i].size} px`;
    button.append(image, name);
    button.onclick = () => { stop(); showFrame(i); };
    return button;
  }));
  element.querySelectorAll(".viewer-choice").forEach((button, i) => button.setAttribute("aria-pressed", i === index));
  showFrame(all.length - 1);
};

const show = () => {
  const pictures = props.value?.pictures || [];
  $(".viewer-empty").hidden = pictures.length > 0;
  $(".viewer-body").hidden = pictures.length === 0;
  stop();
  $(".viewer-choices").hidden = pictures.length < 2;
  $(".viewer-choices").replaceChildren(...pictures.map(({ label, frames }, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "viewer-choice";
    button.title = label;
    const image = new Image();
    image.src = frames[frames.length - 1].src;
    image.alt = label;
    button.append(image);
    button.onclick = () => { stop(); showPicture(i); };
    return button;
  }));
  if (pictures.length) showPicture(0);
};

$(".viewer-slider").addEventListener("input", (event) => { stop(); showFrame(Number(event.target.value)); });
$(".viewer-play").addEventListener("click", play);
watch("value", show);
show();
