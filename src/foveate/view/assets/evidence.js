// Paints what a method noted over the frames: one way of drawing per kind, whatever the method.
(() => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const table = (raw) => (n) => [0, 1, 2].map((k) => raw[3 * (n % (raw.length / 3)) + k]);
  const heat = table(bytes(colours.heat)), label = table(bytes(colours.label));
  const css = (rgb, alpha) => `rgba(${rgb.join(",")},${alpha})`;
  const NOTHING = 255, NO_LABEL = 0xffff;

  function start(root) {
    const tools = root.querySelector(".seen");
    const entries = JSON.parse(tools.querySelector("script").textContent);
    const choice = tools.querySelector("select"), layers = tools.querySelector(".layers");
    const slider = layers.querySelector("input"), scale = tools.querySelector(".scale");
    const depth = root.querySelector(".depth input");
    let offset = 0;
    const views = [...root.querySelectorAll(".view")].map((node) => {
      const v = { node, first: +node.dataset.first, h: +node.dataset.rows, w: +node.dataset.columns,
        plane: +node.dataset.plane, at: offset };
      offset += v.h * v.w;
      return v;
    });
    let entry = null, step = null, value = null;

    const kinds = {
      heat(pen, v, box) {
        each(v, (r, c, n) => {
          if (n === NOTHING) return;
          pen.fillStyle = css(heat(n), 0.72);
          pen.fillRect(...box(r, c));
        });
        outline(pen, v, box, (r, c) => root.isKept(v, r, c), "#fff");
      },
      label(pen, v, box) {
        each(v, (r, c, n) => {
          if (n === NO_LABEL) return;
          pen.fillStyle = css(label(n), 0.42);
          pen.fillRect(...box(r, c));
        });
        borders(pen, v, box);
      },
      mark(pen, v, box) {
        const marks = entry.names.length;
        each(v, (r, c, bits) => {
          if (!bits) { pen.fillStyle = "rgba(10,12,16,.5)"; pen.fillRect(...box(r, c)); return; }
          const [x, y, w, h] = box(r, c), most = Math.min(w, h) / 2;
          let ring = 0;
          for (let k = 0; k < marks; k++) {
            if (!((bits >> k) & 1)) continue;
            const wide = Math.max(1.5, most * 0.24), radius = Math.max(1, most - wide * (0.8 + 1.5 * ring++));
            for (const [colour, width] of [["rgba(0,0,0,.6)", wide * 1.7], [colours.mark[k], wide]]) {
              pen.strokeStyle = colour;
              pen.lineWidth = width;
              pen.beginPath();
              pen.arc(x + w / 2, y + h / 2, radius, 0, 2 * Math.PI);
              pen.stroke();
            }
          }
        });
      },
      boxes(pen, v, box) {
        step.boxes.forEach(([plane, top, left, bottom, right], number) => {
          if (plane !== v.plane) return;
          const [x, y] = box(top, left), [u, t, w, h] = box(bottom - 1, right - 1);
          for (const [colour, width] of [["rgba(0,0,0,.6)", 5], [css(label(number), 1), 3]]) {
            pen.strokeStyle = colour;
            pen.lineWidth = width * v.scale;
            pen.strokeRect(x, y, u + w - x, t + h - y);
          }
        });
      },
    };

    function each(v, draw) {
      for (let r = 0; r < v.h; r++) for (let c = 0; c < v.w; c++) draw(r, c, value[v.at + r * v.w + c]);
    }

    function isWhole(v) {
      for (let r = 0; r < v.h; r++) for (let c = 0; c < v.w; c++) if (!root.isKept(v, r, c)) return false;
      return true;
    }

    // Lines between cells of which one is inside and the other is not.
    function outline(pen, v, box, inside, colour) {
      if (isWhole(v)) return;
      const at = (r, c) => r >= 0 && c >= 0 && r < v.h && c < v.w && inside(r, c);
      for (const [style, width] of [["rgba(0,0,0,.55)", 2.6], [colour, 1.3]]) {
        pen.strokeStyle = style;
        pen.lineWidth = width * v.scale;
        pen.beginPath();
        for (let r = 0; r < v.h; r++) for (let c = 0; c < v.w; c++) {
          if (inside(r, c)) edges(pen, box(r, c), (dr, dc) => !at(r + dr, c + dc));
        }
        pen.stroke();
      }
    }

    function borders(pen, v, box) {
      pen.lineWidth = 1.6 * v.scale;
      const at = (r, c) => (r < 0 || c < 0 || r >= v.h || c >= v.w ? -1 : value[v.at + r * v.w + c]);
      each(v, (r, c, n) => {
        if (n === NO_LABEL) return;
        const [x, y, w, h] = box(r, c), half = pen.lineWidth / 2;
        pen.strokeStyle = css(label(n), 1);
        pen.beginPath();
        edges(pen, [x, y, w, h], (dr, dc) => at(r + dr, c + dc) !== n, half);
        pen.stroke();
      });
    }

    function edges(pen, [x, y, w, h], open, inset = 0) {
      const t = y + inset, b = y + h - inset, l = x + inset, r = x + w - inset;
      if (open(-1, 0)) { pen.moveTo(x, t); pen.lineTo(x + w, t); }
      if (open(1, 0)) { pen.moveTo(x, b); pen.lineTo(x + w, b); }
      if (open(0, -1)) { pen.moveTo(l, y); pen.lineTo(l, y + h); }
      if (open(0, 1)) { pen.moveTo(r, y); pen.lineTo(r, y + h); }
    }

    function paint() {
      for (const v of views) {
        if (!entry) { v.canvas?.remove(); v.canvas = null; continue; }
        if (!v.canvas) {
          v.canvas = document.createElement("canvas");
          v.canvas.className = "evidence";
          v.node.insertBefore(v.canvas, v.node.querySelector("canvas"));
        }
        v.scale = window.devicePixelRatio || 1;
        const W = (v.canvas.width = Math.round(v.node.clientWidth * v.scale));
        const H = (v.canvas.height = Math.round(v.node.clientHeight * v.scale));
        const x = (c) => Math.round((c * W) / v.w), y = (r) => Math.round((r * H) / v.h);
        kinds[entry.kind](v.canvas.getContext("2d"), v, (r, c) => [x(c), y(r), x(c + 1) - x(c), y(r + 1) - y(r)]);
      }
    }

    function explain() {
      scale.textContent = "";
      if (!entry) return;
      const add = (tag, text, style) => {
        const node = document.createElement(tag);
        node.textContent = text;
        if (style) node.style.cssText = style;
        scale.append(node);
        return node;
      };
      if (entry.kind === "heat") {
        const stops = [...Array(12).keys()].map((k) => css(heat(Math.round((k * 254) / 11)), 1));
        add("span", step.low);
        add("i", "", `background:linear-gradient(90deg,${stops.join(",")})`).className = "ramp";
        add("span", step.high);
      } else if (entry.kind === "label") {
        add("span", `${step.count} ${entry.name}`);
      } else if (entry.kind === "mark") {
        entry.names.forEach((name, k) => {
          add("i", "", `border-color:${colours.mark[k]}`).className = "ring";
          add("span", `${name} (${step.counts[k]})`);
        });
      } else add("span", `${step.boxes.length} ${entry.name}`);
      const outlined = entry.kind === "heat" && !views.every(isWhole) && "outlined in white: kept";
      add("span", [entry.caption, outlined].filter(Boolean).join(" · ")).className = "aside";
    }

    function choose() {
      step = entry ? entry.steps[+slider.value] : null;
      if (step && step.data) {
        const raw = bytes(step.data);
        value = entry.kind === "label" ? new Uint16Array(raw.buffer) : raw;
      }
      layers.hidden = !step || step.layer === null;
      slider.hidden = !entry || entry.steps.length < 2;
      layers.querySelector("output").textContent = step ? step.layer : "";
      root.seeing = Boolean(entry);
      root.classList.toggle("seeing", Boolean(entry));
      root.dataset.kind = entry ? entry.kind : "";
      explain();
      paint();
      root.repaint();
    }

    // Beside what a layer goes by stands what it leaves.
    function follow() {
      if (!depth || !step || entry.stage !== "decoder") return;
      const at = JSON.parse(depth.dataset.layers).indexOf(step.layer);
      if (at < 0 || +depth.value === at + 1) return;
      depth.value = at + 1;
      depth.dispatchEvent(new Event("input"));
    }

    root.evidenceAt = (node, r, c) => {
      if (!entry || entry.kind === "boxes") return "";
      const v = views.find((other) => other.node === node), n = value[v.at + r * v.w + c];
      if (entry.kind === "label") return n === NO_LABEL ? "" : `${entry.name}: number ${n + 1}`;
      if (entry.kind === "mark") return entry.names.filter((name, k) => (n >> k) & 1).join(", ");
      if (n === NOTHING) return "";
      const [low, high] = [step.low, step.high].map((text) => parseFloat(text.replace(/^[≤≥] /, "")));
      return `${entry.name} ${Number((low + ((high - low) * n) / 254).toPrecision(3))}`;
    };
    choice.addEventListener("change", () => {
      entry = choice.value === "" ? null : entries[+choice.value];
      slider.max = entry ? entry.steps.length - 1 : 0;
      slider.value = 0;
      choose();
      follow();
    });
    slider.addEventListener("input", () => { choose(); follow(); });
    root.addEventListener("kept", paint);
    window.addEventListener("resize", paint);
  }
  document.querySelectorAll(".item:has(.seen)").forEach(start);
})();
