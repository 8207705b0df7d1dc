// Three linked panels of the explorer. Hovering is answered here; a click asks Python for more patches.

const SIZE = 336; // of a panel's canvas; divisible by the usual grids

function make(tag, className, parent, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function panel(parent, name) {
  const figure = make("figure", "kmex-panel", parent);
  const caption = make("figcaption", "", figure);
  const canvas = make("canvas", `kmex-canvas kmex-${name}`, figure);
  canvas.width = canvas.height = SIZE;
  return { figure, caption, canvas, context: canvas.getContext("2d", { willReadFrequently: true }) };
}

function drawGrid(context, rows, colourOf) {
  const small = document.createElement("canvas");
  small.height = rows.length;
  small.width = rows[0].length;
  const pixels = small.getContext("2d").createImageData(small.width, small.height);
  rows.forEach((row, y) =>
    row.forEach((value, x) => {
      pixels.data.set([...colourOf(value, y, x), 255], 4 * (y * small.width + x));
    }),
  );
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, SIZE, SIZE);
}

function percent(share) {
  return share < 0.01 ? "< 1 %" : `${Math.round(100 * share)} %`;
}

function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toPrecision(3)}`;
}

function render({ model, el }) {
  document.getElementById(model.get("still"))?.remove();
  const root = make("div", "kmex-explorer", el);
  const heading = make("div", "kmex-heading", root);
  const top = make("div", "kmex-panels", root);
  const image = panel(top, "image");
  const map = panel(top, "map");
  const attribution = panel(top, "attribution");
  const why = make("div", "kmex-why", attribution.figure);
  const scale = make("div", "kmex-scale", attribution.figure);
  const detail = make("div", "kmex-detail", root);
  const strip = make("div", "kmex-strip", root);
  const picture = new Image();
  let hovered = -1; // index into view.prototypes

  const view = () => model.get("view");
  const selectedIndex = () => view().prototypes.findIndex((p) => p.prototype === model.get("selected"));
  const shown = () => (hovered >= 0 ? hovered : selectedIndex());

  function outline(context, index) {
    // dim what is outside the segment and draw its edges
    const rows = view().map;
    const edge = (i, count) => Math.round((i * SIZE) / count); // whole pixels: no seams between dimmed cells
    context.fillStyle = "rgba(255, 255, 255, 0.55)";
    context.strokeStyle = "#000";
    context.lineWidth = 2;
    context.beginPath();
    rows.forEach((row, y) =>
      row.forEach((value, x) => {
        const [left, right] = [edge(x, row.length), edge(x + 1, row.length)];
        const [top, bottom] = [edge(y, rows.length), edge(y + 1, rows.length)];
        if (value !== index) context.fillRect(left, top, right - left, bottom - top);
        const beside = row[x + 1];
        const below = rows[y + 1]?.[x];
        if (beside !== undefined && (value === index) !== (beside === index)) {
          context.moveTo(right, top);
          context.lineTo(right, bottom);
        }
        if (below !== undefined && (value === index) !== (below === index)) {
          context.moveTo(left, bottom);
          context.lineTo(right, bottom);
        }
      }),
    );
    context.stroke();
  }

  function paint() {
    const now = view();
    const proportions = picture.naturalWidth ? `${picture.naturalWidth} / ${picture.naturalHeight}` : "1";
    [image, map, attribution].forEach((p) => (p.canvas.style.aspectRatio = proportions));
    image.context.imageSmoothingEnabled = true;
    if (picture.complete && picture.naturalWidth) image.context.drawImage(picture, 0, 0, SIZE, SIZE);
    drawGrid(map.context, now.map, (value) => now.prototypes[value].colour);
    if (now.attribution) drawGrid(attribution.context, now.attribution_colours, (value) => value);
    const index = shown();
    if (index >= 0) {
      [image, map].forEach((p) => outline(p.context, index));
      if (now.attribution) outline(attribution.context, index);
    }
    [...strip.children].forEach((button, i) => button.classList.toggle("kmex-on", i === index));
    describe(index);
  }

  function describe(index) {
    detail.replaceChildren();
    delete detail.dataset.prototype;
    const now = view();
    if (index < 0) {
      make("span", "kmex-hint", detail, "Hover over a segment to see its prototype, click to keep it and see more of its patches.");
      return;
    }
    const p = now.prototypes[index];
    detail.dataset.prototype = p.prototype;
    const words = make("div", "kmex-words", detail);
    const title = make("div", "kmex-title", words);
    const swatch = make("span", "kmex-swatch", title);
    swatch.style.background = `rgb(${p.colour})`;
    title.append(`prototype ${p.prototype} of ${p.class}`);
    make("div", "", words, `${percent(p.share)} of this image`);
    make("div", "kmex-shared", words, `in ${p.shared} of the class's ${p.images} images`);
    if (now.attribution) {
      const rows = now.map;
      const y = rows.findIndex((row) => row.includes(index));
      const value = now.attribution[y][rows[y].indexOf(index)];
      make("div", "kmex-value", words, `attribution ${value} to ${now.target}`);
      make("div", "kmex-points", words, `adds ${signed(p.contribution)} to its score; all segments: ${signed(now.total)}`);
    }
    const kept = model.get("selected") === p.prototype && model.get("nearest").length;
    const urls = kept ? model.get("nearest") : [p.patch];
    urls.forEach((url) => {
      const patch = make("img", "kmex-patch", detail);
      patch.alt = `training patch nearest to prototype ${p.prototype}`;
      patch.src = url;
      patch.style.borderColor = `rgb(${p.colour})`;
    });
  }

  function update() {
    const now = view();
    hovered = -1;
    root.dataset.name = now.name;
    root.dataset.explainer = now.explainer;
    root.dataset.target = now.target;
    heading.replaceChildren();
    const says = [`network: ${now.predicted}`, `${now.explainer}: ${now.explainer_predicted}`];
    if (now.label) says.push(`folder: ${now.label}`);
    make("b", "", heading, now.name);
    heading.append(` · ${says.join(" · ")}`);
    image.caption.textContent = "image";
    map.caption.textContent = `explanation map ${now.explainer}`;
    map.caption.title = "a cell has seen far more than its square: a convolution's outputs depend on what lies around";
    attribution.caption.textContent = now.attribution ? `attribution to ${now.target}` : "no attribution";
    why.textContent = now.attribution ? "" : `Eq. 11 does not hold: ${now.why_no_attribution}.`;
    why.hidden = Boolean(now.attribution);
    attribution.canvas.hidden = scale.hidden = !now.attribution;
    scale.replaceChildren();
    const zero = -now.low / (now.high - now.low); // where 0 lies, in parts of the ramp
    make("span", "", scale, `${zero < 0 ? "← 0 · " : ""}${now.low.toPrecision(3)}`);
    const ramp = make("span", "kmex-ramp", scale);
    if (zero >= 0 && zero <= 1) make("span", "kmex-zero", ramp, "0").style.left = `${100 * zero}%`;
    make("span", "", scale, `${now.high.toPrecision(3)}${zero > 1 ? " · 0 →" : ""}`);
    strip.replaceChildren();
    now.prototypes.forEach((p, i) => {
      const button = make("button", "kmex-button", strip);
      button.title = `prototype ${p.prototype} of ${p.class}`;
      const patch = make("img", "kmex-patch", button);
      patch.alt = `training patch nearest to prototype ${p.prototype} of ${p.class}`;
      patch.src = p.patch;
      patch.style.borderColor = `rgb(${p.colour})`;
      make("span", "", button, `${p.class.replaceAll("_", " ")} · ${percent(p.share)}`);
      button.addEventListener("mouseenter", () => hover(i));
      button.addEventListener("mouseleave", () => hover(-1));
      button.addEventListener("focus", () => hover(i));
      button.addEventListener("blur", () => hover(-1));
      button.addEventListener("click", () => select(i));
    });
    picture.onload = paint;
    picture.src = now.image;
    paint();
  }

  function hover(index) {
    if (index === hovered) return;
    hovered = index;
    paint();
  }

  function select(index) {
    const k = view().prototypes[index].prototype;
    model.set("selected", model.get("selected") === k ? -1 : k);
    model.save_changes();
  }

  function at(event, canvas) {
    const box = canvas.getBoundingClientRect();
    const rows = view().map;
    const y = Math.floor(((event.clientY - box.top) / box.height) * rows.length);
    const x = Math.floor(((event.clientX - box.left) / box.width) * rows[0].length);
    return rows[y]?.[x] ?? -1;
  }

  [image, map, attribution].forEach(({ canvas }) => {
    canvas.addEventListener("mousemove", (event) => hover(at(event, canvas)));
    canvas.addEventListener("mouseleave", () => hover(-1));
    canvas.addEventListener("click", (event) => {
      const index = at(event, canvas);
      if (index >= 0) select(index);
    });
  });
  model.on("change:view", update);
  model.on("change:selected", paint);
  model.on("change:nearest", paint);
  update();
}

export default { render };
