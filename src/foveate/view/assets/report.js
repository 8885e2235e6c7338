// Highlights every patch that one token stands for, in all frames. The report is complete without it.
(() => {
  const say = document.getElementById("say");
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  function start(root) {
    const wide = root.dataset.wide === "1";
    const raw = bytes(root.dataset.groups).buffer;
    const groups = wide ? new Uint32Array(raw) : new Uint16Array(raw);
    const none = wide ? 0xffffffff : 0xffff;
    const alive = bytes(root.dataset.alive || "");
    const row = Math.ceil(Number(root.dataset.tokens) / 8);
    const views = [...root.querySelectorAll(".view")].map((node) => ({
      node, first: +node.dataset.first, h: +node.dataset.rows, w: +node.dataset.columns,
    }));
    const depth = root.querySelector(".depth input");
    const labels = depth ? JSON.parse(depth.dataset.labels) : [];
    let active = none, pinned = false;

    // For the evidence: whether a patch of a view is still there at the depth that is chosen.
    root.isKept = (v, r, c) => {
      const g = groups[v.first + r * v.w + c];
      return g !== none && !gone(g, depth ? +depth.value : 0);
    };
    root.repaint = paint;
    const gone = (g, step) => step > 0 && !((alive[(step - 1) * row + (g >> 3)] >> (g & 7)) & 1);

    function paint() {
      const step = depth ? +depth.value : 0;
      for (const v of views) {
        if (!v.canvas && active === none && !step) continue;
        if (!v.canvas) v.node.append((v.canvas = document.createElement("canvas")));
        const scale = window.devicePixelRatio || 1;
        const W = (v.canvas.width = Math.round(v.node.clientWidth * scale));
        const H = (v.canvas.height = Math.round(v.node.clientHeight * scale));
        const pen = v.canvas.getContext("2d");
        const x = (c) => Math.round((c * W) / v.w), y = (r) => Math.round((r * H) / v.h);
        const at = (r, c) => (r < 0 || c < 0 || r >= v.h || c >= v.w ? none : groups[v.first + r * v.w + c]);
        pen.lineWidth = Math.max(2, 2 * scale);
        for (let r = 0; r < v.h; r++) for (let c = 0; c < v.w; c++) {
          const g = at(r, c), box = [x(c), y(r), x(c + 1) - x(c), y(r + 1) - y(r)];
          if (g !== none && gone(g, step) && !root.seeing) { pen.fillStyle = "rgba(13,15,20,.76)"; pen.fillRect(...box); }
          if (active === none) continue;
          if (g !== active) { pen.fillStyle = "rgba(8,10,14,.55)"; pen.fillRect(...box); continue; }
          pen.strokeStyle = "#ffd84d";
          pen.beginPath();
          if (at(r - 1, c) !== g) { pen.moveTo(x(c), y(r)); pen.lineTo(x(c + 1), y(r)); }
          if (at(r + 1, c) !== g) { pen.moveTo(x(c), y(r + 1)); pen.lineTo(x(c + 1), y(r + 1)); }
          if (at(r, c - 1) !== g) { pen.moveTo(x(c), y(r)); pen.lineTo(x(c), y(r + 1)); }
          if (at(r, c + 1) !== g) { pen.moveTo(x(c + 1), y(r)); pen.lineTo(x(c + 1), y(r + 1)); }
          pen.stroke();
        }
      }
    }

    function show(v, r, c) {
      const g = groups[v.first + r * v.w + c];
      if (g === none) say.textContent = `Dropped: row ${r}, column ${c}, ${v.node.dataset.when}`;
      else {
        let patches = 0;
        const planes = [];
        for (const o of views) {
          let mine = 0;
          for (let i = 0; i < o.h * o.w; i++) mine += groups[o.first + i] === g;
          if (mine) planes.push(o.node.dataset.when);
          patches += mine;
        }
        const span = planes.length > 1 ? `${planes[0]} to ${planes.at(-1)}` : planes[0];
        say.textContent = `Token ${g} stands for ${patches} patch${patches > 1 ? "es" : ""}`;
        if (views.length > 1)
          say.textContent += ` in ${planes.length} frame${planes.length > 1 ? "s" : ""}, ${span}`;
      }
      const more = root.evidenceAt ? root.evidenceAt(v.node, r, c) : "";
      if (more) say.textContent += ` · ${more}`;
      if (g !== active) { active = g; paint(); }
    }

    function clear() { pinned = false; say.textContent = ""; if (active !== none) { active = none; paint(); } }

    const cell = (v, e) => {
      const box = v.node.getBoundingClientRect();
      const clamp = (value, most) => Math.min(most - 1, Math.max(0, Math.floor(value)));
      return [clamp(((e.clientY - box.top) / box.height) * v.h, v.h),
        clamp(((e.clientX - box.left) / box.width) * v.w, v.w)];
    };
    for (const v of views) {
      v.at = [0, 0];
      v.node.addEventListener("pointermove", (e) => {
        if (!pinned && e.pointerType === "mouse") show(v, ...cell(v, e));
      });
      v.node.addEventListener("pointerleave", (e) => { if (!pinned && e.pointerType === "mouse") clear(); });
      v.node.addEventListener("click", (e) => {
        const at = cell(v, e), same = pinned && groups[v.first + at[0] * v.w + at[1]] === active;
        if (same) return clear();
        v.at = at; show(v, ...at); pinned = true;
      });
      v.node.addEventListener("keydown", (e) => {
        const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
        if (e.key === "Escape") clear();
        if (!move) return;
        e.preventDefault();
        v.at = [Math.min(v.h - 1, Math.max(0, v.at[0] + move[0])), Math.min(v.w - 1, Math.max(0, v.at[1] + move[1]))];
        show(v, ...v.at); pinned = true;
      });
    }
    document.addEventListener("keydown", (e) => { if (e.key === "Escape") clear(); });
    window.addEventListener("resize", paint);
    if (depth) depth.addEventListener("input", () => {
      root.querySelector(".depth output").textContent = labels[+depth.value];
      paint();
      root.dispatchEvent(new Event("kept"));
    });
  }
  document.querySelectorAll(".item[data-groups]").forEach(start);
})();
