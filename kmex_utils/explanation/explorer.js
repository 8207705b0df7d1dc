// The explorer: in a notebook a widget whose views the kernel makes, in a page of its own with views embedded.
// Hovering is answered here.

const SHORTEST = 448; // pixels of a canvas' shorter side, at least: a small image still gets fine lines
const STRIP = 100; // thumbnails on the page at once
const COLOURED = 10; // prototypes with a colour of their own; the others are grey and numbered

function make(tag, className, parent, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function labelled(words, tag, parent) {
  const element = make(tag, "", make("label", "kmex-label", parent, words));
  element.setAttribute("aria-label", words);
  return element;
}

function fillSelect(select, options, value) {
  select.replaceChildren(...options.map(([key, words]) => new Option(words, key)));
  select.value = value;
}

function button(words, title, parent, click) {
  const element = make("button", "kmex-control", parent, words);
  element.title = title;
  element.setAttribute("aria-label", title);
  element.addEventListener("click", click);
  return element;
}

function panel(parent, name) {
  const figure = make("figure", "kmex-panel", parent);
  const caption = make("figcaption", "", figure);
  const canvas = make("canvas", `kmex-canvas kmex-${name}`, make("div", "kmex-frame", figure));
  canvas.setAttribute("role", "img");
  return { figure, caption, canvas, context: canvas.getContext("2d"), base: document.createElement("canvas") };
}

function percent(share) {
  return share > 0 && share < 0.01 ? "< 1\u00a0%" : `${Math.round(100 * share)}\u00a0%`;
}

function short(name) {
  // without CUB's or ImageNet's number
  return name.replace(/^(\d+\.|n\d{8}[-_])(?=\D)/, "").replaceAll("_", " ");
}

function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toPrecision(3)}`;
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function place(share) {
  return Math.min(255, Math.max(0, Math.floor(256 * share))); // in a ramp of 256 colours
}

// A map in colours, a pixel a cell.
function cells(rows, colourOf) {
  const small = document.createElement("canvas");
  [small.width, small.height] = [rows[0].length, rows.length];
  const pixels = small.getContext("2d").createImageData(small.width, small.height);
  rows.flat().forEach((value, i) => pixels.data.set([...colourOf(value), 255], 4 * i));
  small.getContext("2d").putImageData(pixels, 0, 0);
  return small;
}

export function render({ model, el }) {
  document.querySelectorAll(`[id="${model.get("still")}"]`).forEach((still) => still.remove());
  const about = model.get("about");
  const root = make("section", "kmex-explorer", el);
  root.tabIndex = 0;
  root.setAttribute("aria-label", "Explorer. Left and right arrow: other image; plus and minus: zoom; Escape: no segment");
  root.dataset.lmSuppressShortcuts = "true"; // else JupyterLab takes the arrow keys

  let hovered = -1; // index into view.prototypes
  let zoom = 1;
  const view = () => model.get("view");
  const choice = () => model.get("choice");
  const blockName = () => about.blocks.find(([b]) => b === choice().start_block)[1];
  const shown = () => (hovered >= 0 ? hovered : view().prototypes.findIndex((p) => p.prototype === model.get("selected")));

  function send(name, value) {
    model.set(name, value);
    model.save_changes();
  }
  const choose = (changes) => send("choice", { ...choice(), ...changes });

  // controls

  const bar = make("div", "kmex-bar", root);
  const first = make("div", "kmex-row", bar);
  button("‹", "previous image", first, () => step(-1));
  const images = make("select", "kmex-images", first);
  images.setAttribute("aria-label", "image");
  images.addEventListener("change", () => choose({ image: Number(images.value) }));
  button("›", "next image", first, () => step(1));
  const count = make("span", "kmex-count", first);
  const blocks = about.blocks.map(([b, name]) =>
    button(name, `explainer ${name}`, first, () => choose({ start_block: b })),
  );
  const second = make("div", "kmex-row", bar);
  const filter = labelled("show", "select", second);
  const ofClass = labelled("class", "select", second);
  const target = labelled("attribution to", "select", second);
  const minus = labelled("minus that to", "select", second);
  const opacity = labelled("map over image", "input", second);
  Object.assign(opacity, { type: "range", min: 0, max: 100, value: 70 });
  opacity.addEventListener("input", paint);
  const zooms = labelled("zoom", "select", second);
  fillSelect(zooms, [1, 2, 4, 8].map((z) => [z, `${z} ×`]), 1);
  zooms.addEventListener("change", () => setZoom(Number(zooms.value)));

  fillSelect(ofClass, [["", "all"], ...about.classes.map((name) => [name, name])], "");
  const targets = about.targets.map((name) => [name, name]);
  fillSelect(target, [["", "predicted"], ...targets], choice().target);
  fillSelect(minus, [["", "nothing"], ...targets], choice().minus);
  target.addEventListener("change", () => choose({ target: target.value }));
  minus.addEventListener("change", () => choose({ minus: minus.value }));
  [target, minus].forEach((select) => (select.parentElement.hidden = !targets.length));
  [filter, ofClass].forEach((select) =>
    select.addEventListener("change", () => {
      if (filter.value === "predict") send("predict", true);
      else refresh();
    }),
  );

  const tests = {
    all: () => true,
    network: ({ label, said }) => label && said?.network !== label,
    explainer: ({ label, said }) => label && said?.[blockName()] !== label,
    disagree: ({ said }) => new Set(about.blocks.map(([, name]) => said?.[name])).size > 1,
  };

  function fillFilter() {
    const rows = model.get("images");
    const [known, labels] = [rows.some((row) => row.said), rows.some((row) => row.label)];
    const options = [["all", "all images"]];
    if (known && labels && about.same_words) options.push(["network", "network wrong"]);
    if (known && labels) options.push(["explainer", `${blockName()} wrong`]);
    if (known && about.blocks.length > 1) options.push(["disagree", "explainers disagree"]);
    if (!known) options.push(["predict", "… predict all images first"]);
    const before = filter.value;
    fillSelect(filter, options, options.some(([key]) => key === before) ? before : "all");
    ofClass.disabled = !known;
  }

  function matching() {
    const [test, name] = [tests[filter.value] ?? tests.all, ofClass.value];
    return [...model.get("images").entries()]
      .filter(([, row]) => test(row) && (!name || (row.label || row.said?.network) === name))
      .map(([i]) => i);
  }

  function step(by) {
    const list = matching();
    const next = list[list.indexOf(choice().image) + by] ?? (list.includes(choice().image) ? undefined : list[0]);
    if (next !== undefined) choose({ image: next });
  }

  function setZoom(z) {
    zoom = Math.min(8, Math.max(1, z));
    zooms.value = zoom;
    root.style.setProperty("--zoom", zoom);
    root.classList.toggle("kmex-zoomed", zoom > 1);
  }

  root.addEventListener("keydown", (event) => {
    if (event.target.closest("select, input") || event.ctrlKey || event.altKey || event.metaKey) return;
    const keys = {
      ArrowLeft: () => step(-1),
      ArrowRight: () => step(1),
      "+": () => setZoom(2 * zoom),
      "-": () => setZoom(zoom / 2),
      Escape: () => send("selected", -1),
    };
    if (!(event.key in keys)) return;
    event.preventDefault();
    event.stopPropagation();
    keys[event.key]();
  });

  // what is seen

  const thumbnails = make("div", "kmex-thumbnails", root);
  const heading = make("div", "kmex-heading", root);
  heading.setAttribute("aria-live", "polite");
  const body = make("div", "kmex-body", root);
  const top = make("div", "kmex-panels", body);
  const image = panel(top, "image");
  const map = panel(top, "map");
  const attribution = panel(top, "attribution");
  const certainty = panel(top, "certainty");
  const panels = [image, map, attribution, certainty];
  const why = make("div", "kmex-why", attribution.figure);
  const scale = make("div", "kmex-scale", attribution.figure);
  const sure = make("div", "kmex-scale", certainty.figure);
  const detail = make("aside", "kmex-detail", body);
  const strip = make("div", "kmex-strip", body);
  detail.setAttribute("aria-label", "prototype");
  const picture = new Image();

  function refresh() {
    // the images to choose from
    const [list, rows, now] = [matching(), model.get("images"), choice().image];
    fillSelect(images, list.map((i) => [i, rows[i].name]), now);
    const at = list.indexOf(now);
    count.textContent = list.length ? `${at < 0 ? "–" : at + 1} of ${list.length}` : "no image is so";
    root.classList.toggle("kmex-empty", rows.length > 0 && !list.length);
    const start = Math.max(0, Math.min(at - STRIP / 2, list.length - STRIP));
    const inStrip = list.slice(start, start + STRIP);
    thumbnails.replaceChildren();
    inStrip.forEach((i) => {
      const { name, label, said } = rows[i];
      const wrong = label && said && said[blockName()] !== label;
      const thumbnail = make("button", `kmex-thumbnail${wrong ? " kmex-wrong" : ""}`, thumbnails);
      thumbnail.title = `${name}${wrong ? `: ${blockName()} says ${said[blockName()]}` : ""}`;
      thumbnail.setAttribute("aria-label", thumbnail.title);
      thumbnail.setAttribute("aria-current", i === now);
      thumbnail.dataset.image = i;
      thumbnail.addEventListener("click", () => choose({ image: i }));
      if (i === now) thumbnails.scrollLeft = thumbnail.offsetLeft - thumbnails.clientWidth / 2;
    });
    showThumbnails();
    const missing = inStrip.filter((i) => !(i in model.get("thumbnails")));
    if (missing.length) send("wanted", missing);
    if (list.length && at < 0) choose({ image: list[0] });
  }

  function showThumbnails() {
    const known = model.get("thumbnails");
    [...thumbnails.children].forEach((thumbnail) => {
      if (!known[thumbnail.dataset.image] || thumbnail.querySelector("img")) return;
      const small = make("img", "", thumbnail);
      small.alt = "";
      small.src = known[thumbnail.dataset.image];
    });
  }

  // [left, top, right, bottom] of a cell in canvas pixels: whole ones, so that cells leave no seams
  function corners(x, y, columns, rows) {
    const { width, height } = image.canvas;
    const [left, top, right, bottom] = view().box;
    const across = (i) => Math.round(width * (left + (i / columns) * (right - left)));
    const down = (i) => Math.round(height * (top + (i / rows) * (bottom - top)));
    return [across(x), down(y), across(x + 1), down(y + 1)];
  }

  // a path along the edges between cells of a map that differ
  function edges(context, rows, differ) {
    context.beginPath();
    rows.forEach((row, y) =>
      row.forEach((value, x) => {
        const [left, top, right, bottom] = corners(x, y, row.length, rows.length);
        if (x + 1 < row.length && differ(value, row[x + 1])) {
          context.moveTo(right, top);
          context.lineTo(right, bottom);
        }
        if (y + 1 < rows.length && differ(value, rows[y + 1][x])) {
          context.moveTo(left, bottom);
          context.lineTo(right, bottom);
        }
      }),
    );
  }

  function stroke(context, colour, width) {
    context.strokeStyle = colour;
    context.lineWidth = (width * image.canvas.width) / SHORTEST;
    context.stroke();
  }

  function layer({ base }, rows, colourOf) {
    // over the picture in grey, so that every colour is the layer's
    const context = base.getContext("2d");
    const [left, top, right, bottom] = corners(0, 0, 1, 1);
    context.globalCompositeOperation = "saturation";
    context.fillStyle = "#808080";
    context.fillRect(0, 0, base.width, base.height);
    context.globalCompositeOperation = "source-over";
    context.globalAlpha = opacity.value / 100;
    context.imageSmoothingEnabled = false;
    context.drawImage(cells(rows, colourOf), left, top, right - left, bottom - top);
    context.globalAlpha = 1;
  }

  // everything but the segment hovered or kept
  function paint() {
    const now = view();
    const [width, height] = [picture.naturalWidth || 1, picture.naturalHeight || 1];
    const times = Math.max(1, Math.ceil(SHORTEST / Math.min(width, height)));
    panels.forEach(({ canvas, base }) => {
      [canvas.width, canvas.height] = [base.width, base.height] = [times * width, times * height];
      const context = base.getContext("2d");
      if (picture.naturalWidth) context.drawImage(picture, 0, 0, base.width, base.height);
    });
    layer(map, now.map, (value) => now.prototypes[value].colour);
    numbers(map.base.getContext("2d"));
    const span = now.high - now.low;
    if (now.attribution) layer(attribution, now.attribution, (v) => about.diverging[place((v - now.low) / span)]);
    if (now.certainty) layer(certainty, now.certainty, (value) => about.sequential[place(value)]);
    const [left, top, right, bottom] = corners(0, 0, 1, 1);
    panels.forEach(({ base }) => {
      // lighter what the network does not see
      const context = base.getContext("2d");
      context.beginPath();
      context.rect(0, 0, base.width, base.height);
      context.rect(left, top, right - left, bottom - top);
      context.fillStyle = "rgba(255, 255, 255, 0.7)";
      context.fill("evenodd");
    });
    point();
  }

  // grey prototypes told apart: their borders, and the number of each in the cell nearest to its centre
  function numbers(context) {
    const rows = view().map;
    edges(context, rows, (a, b) => a !== b && a >= COLOURED && b >= COLOURED);
    stroke(context, "#666", 1);
    const places = new Map();
    rows.forEach((row, y) => row.forEach((value, x) => places.set(value, [...(places.get(value) ?? []), [x, y]])));
    const [left, , right] = corners(0, 0, rows[0].length, rows.length);
    context.font = `${0.72 * (right - left)}px system-ui, sans-serif`;
    [context.textAlign, context.textBaseline, context.fillStyle] = ["center", "middle", "#222"];
    if (rows[0].length > 40) return; // too small to read
    places.forEach((at, index) => {
      if (index < COLOURED) return;
      const [mx, my] = [0, 1].map((axis) => mean(at.map((cell) => cell[axis])));
      const [x, y] = at.sort((a, b) => Math.hypot(a[0] - mx, a[1] - my) - Math.hypot(b[0] - mx, b[1] - my))[0];
      const [l, t, r, b] = corners(x, y, rows[0].length, rows.length);
      context.fillText(index + 1, (l + r) / 2, (t + b) / 2);
    });
  }

  // the segment hovered or kept: outside it all is lighter, its edge is drawn
  function point() {
    const [index, rows] = [shown(), view().map];
    panels.forEach(({ base, canvas, context }) => {
      if (canvas.closest("[hidden]")) return;
      context.drawImage(base, 0, 0);
      if (index < 0) return;
      context.fillStyle = "rgba(255, 255, 255, 0.55)";
      rows.forEach((row, y) =>
        row.forEach((value, x) => {
          if (value === index) return;
          const [left, top, right, bottom] = corners(x, y, row.length, rows.length);
          context.fillRect(left, top, right - left, bottom - top);
        }),
      );
      edges(context, rows, (a, b) => (a === index) !== (b === index));
      stroke(context, "#fff", 4);
      stroke(context, "#000", 2);
    });
    [...strip.children].forEach((child, i) => child.classList.toggle("kmex-on", i === index));
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
    make("span", "kmex-swatch", title).style.background = `rgb(${p.colour})`;
    title.append(`${index + 1}: prototype ${p.prototype} of ${p.class}${p.name ? `, ${p.name}` : ""}`);
    make("div", "", words, `${percent(p.share)} of this image`);
    make("div", "kmex-shared", words, `in ${p.shared} of the class's ${p.images} images`);
    if (now.attribution) {
      const y = now.map.findIndex((row) => row.includes(index));
      const value = now.attribution[y][now.map[y].indexOf(index)];
      make("div", "kmex-value", words, `attribution ${value} to ${now.target}`);
      make("div", "kmex-points", words, `adds ${signed(p.contribution)} to its score; all segments: ${signed(now.total)}`);
    }
    if (p.exists) make("div", "kmex-exists", words, `exists in ${p.exists} refits`);
    if (now.certainty) {
      const inMap = now.map.flat();
      const share = mean(now.certainty.flat().filter((_, i) => inMap[i] === index));
      make("div", "kmex-sure", words, `a cell keeps it in ${percent(share)} of refits, on average`);
    }
    const kept = model.get("selected") === p.prototype && model.get("gallery").length;
    const patches = make("div", "kmex-patches", detail);
    (kept ? model.get("gallery") : [{ word: "nearest", url: p.patch }]).forEach(({ word, url }) => {
      const figure = make("figure", "", patches);
      const patch = make("img", "kmex-patch", figure);
      patch.alt = `training patch of prototype ${p.prototype}: ${word}`;
      patch.src = url;
      patch.style.borderColor = `rgb(${p.colour})`;
      make("figcaption", "", figure, word);
    });
  }

  function showScale(element, colours, low, high) {
    element.replaceChildren();
    make("span", "", element, low);
    const line = make("span", "kmex-ramp", element);
    line.style.background = `linear-gradient(to right, ${colours.filter((_, i) => i % 17 === 0).map((c) => `rgb(${c})`)})`;
    make("span", "", element, high);
    return line;
  }

  function showScales({ low, high }) {
    const zero = -low / (high - low); // where 0 lies, in parts of the ramp
    const ends = [`${zero < 0 ? "← 0 · " : ""}${low.toPrecision(3)}`, `${high.toPrecision(3)}${zero > 1 ? " · 0 →" : ""}`];
    const line = showScale(scale, about.diverging, ...ends);
    if (zero >= 0 && zero <= 1) make("span", "kmex-zero", line, "0").style.left = `${100 * zero}%`;
    showScale(sure, about.sequential, "in none", "in all");
  }

  function showStrip(now) {
    strip.replaceChildren();
    now.prototypes.forEach((p, i) => {
      const entry = make("button", "kmex-button", strip);
      entry.title = `prototype ${p.prototype} of ${p.class}`;
      const patch = make("img", "kmex-patch", entry);
      patch.alt = `training patch nearest to prototype ${p.prototype} of ${p.class}`;
      patch.src = p.patch;
      patch.style.borderColor = `rgb(${p.colour})`;
      make("span", "", entry, `${i + 1}: ${short(p.name || p.class)} · ${percent(p.share)}`);
      entry.addEventListener("mouseenter", () => hover(i));
      entry.addEventListener("mouseleave", () => hover(-1));
      entry.addEventListener("focus", () => hover(i));
      entry.addEventListener("blur", () => hover(-1));
      entry.addEventListener("click", () => select(i));
    });
  }

  function update() {
    const now = view();
    hovered = -1;
    Object.assign(root.dataset, { name: now.name, explainer: now.explainer, target: now.target });
    const says = [`network: ${now.predicted}`, `${now.explainer}: ${now.explainer_predicted}`];
    if (now.label) says.push(`folder: ${now.label}`);
    heading.replaceChildren();
    make("b", "", heading, now.name);
    heading.append(` · ${says.join(" · ")}`);
    about.notes[now.explainer].forEach((note) => make("div", "kmex-note", heading, note));
    image.caption.textContent = "image";
    map.caption.textContent = `explanation map ${now.explainer}`;
    map.caption.title = "a cell has seen far more than its square: a convolution's outputs depend on what lies around";
    attribution.caption.textContent = now.attribution ? `attribution to ${short(now.target)}` : "no attribution";
    why.textContent = now.attribution ? "" : `Eq. 11 does not hold: ${about.why_no_attribution}.`;
    why.hidden = Boolean(now.attribution);
    attribution.canvas.parentElement.hidden = scale.hidden = !now.attribution;
    certainty.figure.hidden = !now.certainty;
    if (now.certainty) {
      certainty.caption.textContent = `same in refits: ${percent(mean(now.certainty.flat()))}`;
    }
    panels.forEach(({ canvas, caption }) => canvas.setAttribute("aria-label", caption.textContent));
    showScales(now);
    showStrip(now);
    picture.onload = paint;
    picture.src = now.image;
    paint();
  }

  // a rebuilt list takes the focus of its buttons with it
  function keepingFocus(change) {
    return () => {
      const had = root.contains(root.getRootNode().activeElement);
      change();
      if (had && !root.contains(root.getRootNode().activeElement)) root.focus({ preventScroll: true });
    };
  }

  function chosen() {
    const now = choice();
    blocks.forEach((element, i) => element.setAttribute("aria-pressed", about.blocks[i][0] === now.start_block));
    [target.value, minus.value] = [now.target, now.minus];
    fillFilter();
    refresh();
  }

  function hover(index) {
    if (index === hovered) return;
    hovered = index;
    point();
  }

  function select(index) {
    const k = view().prototypes[index].prototype;
    send("selected", model.get("selected") === k ? -1 : k);
  }

  function at(event, frame) {
    // zoomed about the pointer, what is under it stays where it was
    const frameBox = frame.getBoundingClientRect();
    const [x, y] = [(event.clientX - frameBox.left) / frameBox.width, (event.clientY - frameBox.top) / frameBox.height];
    root.style.setProperty("--x", `${100 * x}%`);
    root.style.setProperty("--y", `${100 * y}%`);
    const [rows, [left, top, right, bottom]] = [view().map, view().box];
    const row = rows[Math.floor(((y - top) / (bottom - top)) * rows.length)];
    return row?.[Math.floor(((x - left) / (right - left)) * row.length)] ?? -1;
  }

  panels.forEach(({ canvas }) => {
    const frame = canvas.parentElement;
    frame.addEventListener("pointermove", (event) => hover(at(event, frame)));
    frame.addEventListener("pointerleave", () => hover(-1));
    frame.addEventListener("click", (event) => {
      const index = at(event, frame);
      if (index >= 0) select(index);
    });
  });
  model.on("change:view", keepingFocus(update));
  model.on("change:choice", keepingFocus(chosen));
  model.on("change:images", keepingFocus(chosen));
  model.on("change:thumbnails", showThumbnails);
  model.on("change:selected", point);
  model.on("change:gallery", point);
  setZoom(1);
  update();
  chosen();
  return root;
}

// What the kernel answers in a notebook, from the data of a page.
export function embedded(data) {
  const listeners = {};
  const values = { ...data, still: "", selected: -1, gallery: [], wanted: [], choice: { image: 0, target: "", minus: "" } };
  values.choice.start_block = data.about.blocks.at(-1)[0];
  const fire = (name) => (listeners[`change:${name}`] ?? []).forEach((listener) => listener());
  function answer() {
    const { image, start_block } = values.choice;
    const { prototypes, ...rest } = data.views[image][start_block];
    const known = data.prototypes[start_block];
    const drawn = { image: data.thumbnails[image], box: data.boxes[image] };
    values.view = { ...rest, ...drawn, prototypes: prototypes.map((p) => ({ ...p, ...known[p.prototype] })) };
  }
  answer();
  const model = {
    get: (name) => values[name],
    on: (event, listener) => (listeners[event] ??= []).push(listener),
    save_changes() {},
    set(name, value) {
      values[name] = value;
      if (name === "selected") values.gallery = data.prototypes[values.choice.start_block][value]?.gallery ?? [];
      fire(name);
      if (name === "choice") {
        model.set("selected", -1);
        answer();
        fire("view");
      }
    },
  };
  return model;
}

export default { render };
