// The pickers of the report: model, layer and text. Drawings repeat those of page_view.py for the layer picked.
"use strict";
(() => {
  const UNIT = 100000; // loads are whole numbers of this part
  const LIMITS = [0.25, 0.5, 0.7, 0.9, 1.1, 1.5, 2, 4]; // as in page_grid.py
  const COLOURS = 12;
  const models = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  for (const button of all(".copy")) {
    button.hidden = false;
    button.addEventListener("click", () => copy(button));
  }
  let opened = []; // for printing
  addEventListener("beforeprint", () => {
    opened = all("details:not([open])");
    opened.forEach((each) => (each.open = true));
  });
  addEventListener("afterprint", () => opened.forEach((each) => (each.open = false)));
  if (!models.length) return;

  const form = document.getElementById("pickers");
  const slider = document.getElementById("layer");
  const blocks = models.map((_, i) => all(`.of-model[data-model="${i}"]`));
  const state = { model: 0, layer: models[0].layers[models[0].at], passage: 0 };

  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  /** The place of the picked layer in this model, or of the nearest one that it has. */
  function placeIn(model) {
    let best = 0;
    model.layers.forEach((layer, i) => {
      if (Math.abs(layer - state.layer) < Math.abs(model.layers[best] - state.layer)) best = i;
    });
    return best;
  }

  const percent = (load) => (load === null ? "–" : ((load * 100) / UNIT).toFixed(2) + " %");
  const times = (ratio) => (ratio === null ? "not measured" : "× " + ratio.toFixed(2));

  function level(ratio) {
    if (ratio === null) return null;
    return ratio <= 0 ? 0 : 1 + LIMITS.filter((limit) => ratio >= limit).length;
  }

  function heatPaths(rows) {
    const paths = new Map();
    rows.forEach((row, y) => {
      const levels = row.map(level);
      for (let x = 0, end; x < levels.length; x = end) {
        for (end = x + 1; end < levels.length && levels[end] === levels[x]; end++);
        if (levels[x] === null) continue;
        paths.set(levels[x], (paths.get(levels[x]) || "") + `M${x} ${y}h${end - x}v1h-${end - x}z`);
      }
    });
    return [...paths].sort((a, b) => a[0] - b[0]);
  }

  function drawHeat(svg, rows) {
    const nodes = heatPaths(rows).map(([key, d]) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("class", "l" + key);
      path.setAttribute("d", d);
      return path;
    });
    svg.replaceChildren(...nodes);
  }

  function drawBars(block, model, place) {
    const box = block.querySelector(".bars");
    const load = model.load[place];
    const busiest = load.map((_, i) => i).filter((i) => load[i] !== null).sort((a, b) => load[b] - load[a] || a - b);
    const values = busiest.map((i) => load[i]);
    const importance = busiest.map((i) => model.importance[place][i]);
    const top = Math.max(...values, ...importance.filter((each) => each !== null), (1.25 * UNIT) / model.experts);
    const height = (value) => Math.floor((1000 * value) / top + 0.5);
    const bar = (value, i) => `M${10 * i + 1} 1000v-${height(value)}h8v${height(value)}z`;
    const tick = (value, i) => (value === null ? "" : `M${10 * i + 1} ${1000 - height(value)}h8`);
    box.querySelector(".bar").setAttribute("d", values.map(bar).join(""));
    box.querySelector(".tick").setAttribute("d", importance.map(tick).join(""));
    box.querySelector(".uniform").style.bottom = ((100 * UNIT) / model.experts / top).toFixed(2) + "%";
    box.querySelector(".busiest span").textContent = percent(values.length ? values[0] : null);
  }

  /** Each domain's load over that of all text, and the experts ordered by the domain that prefers them most. */
  function preference(model, place) {
    const load = model.load[place];
    const rows = model.domainLoad[place].map((row) =>
      row.map((mine, i) => (mine === null || !load[i] ? null : mine / load[i])),
    );
    const key = load.map((_, expert) => {
      const column = rows.map((row) => (row[expert] === null ? -1 : row[expert]));
      const best = Math.max(...column);
      return [best < 0 ? rows.length : column.indexOf(best), -best, expert];
    });
    const order = key.sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]).map((each) => each[2]);
    return { order, rows: rows.map((row) => order.map((expert) => row[expert])) };
  }

  function drawPassage(figure, first) {
    const counts = new Map();
    for (const expert of first) if (expert !== null) counts.set(expert, (counts.get(expert) || 0) + 1);
    const ranked = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    const ranks = new Map(ranked.slice(0, COLOURS).map(([expert], rank) => [expert, rank]));
    all(".text > span", figure).forEach((span, i) => {
      const expert = i < first.length ? first[i] : null;
      const rank = ranks.get(expert);
      span.className = expert === null ? "none" : rank === undefined ? "cx" : "c" + rank;
      if (span.className === "cx") span.setAttribute("style", "--e: " + expert);
      else span.removeAttribute("style");
    });
    const items = ranked.slice(0, COLOURS).map(([expert, count], rank) => {
      const item = make("li");
      item.append(make("i", "c" + rank), String(expert), make("small", "", count));
      return item;
    });
    if (ranked.length > COLOURS) {
      const item = make("li");
      item.append(make("i", "pale"), `${ranked.length - COLOURS} others`);
      items.push(item);
    }
    figure.querySelector(".experts").replaceChildren(...items);
    figure.tell = (i) => {
      const expert = i < first.length ? first[i] : null;
      return { expert, count: counts.get(expert) || 0 };
    };
  }

  function drawTop(list, model, place) {
    const load = model.load[place];
    const busiest = load.map((_, i) => i).sort((a, b) => (load[b] || 0) - (load[a] || 0) || a - b);
    const items = busiest.map((expert) => {
      const item = make("li");
      const words = make("span");
      for (const [word, , share] of model.top[place][expert]) {
        const one = make("span", "word");
        one.append(make("bdi", "", model.words[word]), make("small", "", share === null ? "" : share + " %"));
        words.append(one);
      }
      if (!words.childNodes.length) words.textContent = "–";
      item.append(make("b", "", expert), make("small", "", percent(load[expert])), words);
      return item;
    });
    list.replaceChildren(...items);
  }

  function drawModel(i) {
    const model = models[i];
    const place = placeIn(model);
    for (const block of blocks[i]) {
      all(".layer-now", block).forEach((node) => (node.textContent = model.layers[place]));
      if (block.querySelector(".bars")) drawBars(block, model, place);
      const map = block.querySelector('[data-map="preference"] svg');
      if (map) drawHeat(map, preference(model, place).rows);
      all(".passage", block).forEach((figure, p) => drawPassage(figure, (model.first[p] || [])[place] || []));
      const list = block.querySelector(".top");
      if (list) drawTop(list, model, place);
      const mark = block.querySelector(".mark");
      if (mark) {
        mark.hidden = false;
        mark.style.top = (100 * place) / model.layers.length + "%";
        mark.style.height = 100 / model.layers.length + "%";
      }
    }
    all(".readout[data-was]").forEach((node) => (node.textContent = node.dataset.was));
  }

  function show() {
    const model = models[state.model];
    blocks.forEach((each, i) => each.forEach((block) => (block.hidden = i !== state.model)));
    all(".passage").forEach((figure) => (figure.hidden = Number(figure.dataset.passage) !== state.passage));
    const place = placeIn(model);
    slider.max = model.layers.length - 1;
    slider.value = place;
    slider.setAttribute("aria-valuetext", "layer " + model.layers[place]);
    all("#pickers .layer-now, #tokens > p .layer-now").forEach((node) => (node.textContent = model.layers[place]));
    for (const button of all("[data-step]"))
      button.disabled = model.layers[place + Number(button.dataset.step)] === undefined;
    models.forEach((_, i) => drawModel(i)); // the hidden ones too: they are printed
  }

  function pick(place) {
    const { layers } = models[state.model];
    state.layer = layers[Math.min(Math.max(place, 0), layers.length - 1)];
    show();
  }

  slider.addEventListener("input", () => pick(Number(slider.value)));
  for (const button of all("[data-step]"))
    button.addEventListener("click", () => pick(placeIn(models[state.model]) + Number(button.dataset.step)));
  for (const radio of all('input[name="model"]'))
    radio.addEventListener("change", () => {
      state.model = Number(radio.value);
      show();
    });
  document.getElementById("domain").addEventListener("change", (event) => {
    state.passage = Number(event.target.value);
    show();
  });
  form.addEventListener("submit", (event) => event.preventDefault());

  /** The cell under the pointer. */
  function cell(event, svg, columns, rows) {
    const box = svg.getBoundingClientRect();
    const within = (value, count) => Math.min(Math.max(Math.floor(value * count), 0), count - 1);
    return [
      within((event.clientX - box.left) / box.width, columns),
      within((event.clientY - box.top) / box.height, rows),
    ];
  }

  function say(node, text) {
    if (!node.dataset.was) node.dataset.was = node.textContent;
    node.textContent = text;
  }

  models.forEach((model, i) => {
    for (const block of blocks[i]) {
      const load = block.querySelector('[data-map="load"] svg');
      const told = (name) => block.querySelector(`[data-readout="${name}"]`);
      if (load) {
        const at = (event) => cell(event, load, model.experts, model.layers.length);
        load.addEventListener("pointermove", (event) => {
          const [expert, place] = at(event);
          const value = model.load[place][expert];
          const ratio = value === null ? null : (value * model.experts) / UNIT;
          say(told("load"), `Layer ${model.layers[place]}, expert ${expert}: ${percent(value)}, ${times(ratio)} the even load.`);
        });
        load.addEventListener("click", (event) => pick(at(event)[1]));
      }
      const map = block.querySelector('[data-map="preference"] svg');
      if (map)
        map.addEventListener("pointermove", (event) => {
          const { order, rows } = preference(model, placeIn(model));
          const [x, y] = cell(event, map, model.experts, model.domains.length);
          const share = percent(model.domainLoad[placeIn(model)][y][order[x]]);
          say(told("preference"), `${model.domains[y]}, expert ${order[x]}: ${share} of its selections, ${times(rows[y][x])} that on all text.`);
        });
      all(".passage", block).forEach(watchPassage);
    }
  });

  /** Says the expert of the token pointed at, or reached with the arrow keys, and underlines the expert's others. */
  function watchPassage(figure) {
    const text = figure.querySelector(".text");
    const spans = [...text.children];
    const readout = figure.querySelector(".readout");
    let here = -1;
    function go(i) {
      here = i;
      const chosen = i < 0 ? { expert: null, count: 0 } : figure.tell(i);
      spans.forEach((span, j) => {
        span.classList.toggle("here", j === i);
        span.classList.toggle("same", chosen.expert !== null && figure.tell(j).expert === chosen.expert);
      });
      if (i < 0) return;
      const which = chosen.expert === null ? "not measured" : `expert ${chosen.expert} first, as for ${chosen.count} of ${spans.length} tokens here`;
      say(readout, `“${spans[i].textContent.replace(/\n/g, "")}”: ${which}.`);
    }
    text.addEventListener("pointerover", (event) => {
      const i = spans.indexOf(event.target.closest(".text > span"));
      if (i >= 0) go(i);
    });
    text.addEventListener("pointerleave", () => go(-1));
    text.addEventListener("blur", () => go(-1));
    text.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10, Home: -Infinity, End: Infinity };
      if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      go(Math.min(Math.max(here + steps[event.key], 0), spans.length - 1));
    });
  }

  async function copy(button) {
    const node = document.getElementById(button.dataset.copy);
    const label = button.firstChild;
    try {
      await navigator.clipboard.writeText(node.textContent);
    } catch {
      getSelection().selectAllChildren(node); // pages from disk may lack the clipboard
      document.execCommand("copy");
    }
    label.textContent = "Copied";
    setTimeout(() => (label.textContent = "Copy"), 1500);
  }

  form.hidden = false;
  all(".readout").forEach((node) => (node.hidden = false));
  show();
})();
