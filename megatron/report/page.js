// Draws the curves in place of the picture, so that one can read values and look closer.
"use strict";
(() => {
  const { range: whole, panels } = JSON.parse(document.getElementById("curves").textContent);
  const EDGE = { left: 52, right: 24, top: 10, bottom: 22 };
  const INK = "#1F2933", PALE = "#E4E7EB", SHADE = "rgba(0, 114, 178, 0.12)";
  const LOOKS = {
    line: { width: 1.8 }, faint: { width: 0.8, alpha: 0.35 }, dots: { width: 1.2, dash: [2, 3] },
    marks: {}, resumes: { width: 1.2, dash: [5, 4] },
  };
  let range = whole, cursor = null, dragged = null;

  const short = (value) => {
    for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= unit) return +(value / unit).toPrecision(4) + letter;
    return String(+value.toPrecision(4));
  };

  // The first index whose step is not below the given one.
  const search = (steps, step) => {
    let low = 0, high = steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low;
  };

  const ticksOf = (low, high, log) => {
    const ticks = [];
    if (log && high / low > 10) {
      for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10)
        for (const digit of high / low > 1e3 ? [1] : [1, 2, 5]) ticks.push(digit * power);
    } else {
      const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
      const step = power * [1, 2, 5, 10].find((digit) => digit * power >= rough);
      for (let k = Math.ceil(low / step); k * step <= high; k++) ticks.push(k * step);
    }
    return ticks.filter((tick) => tick >= low && tick <= high);
  };

  // The values that are seen, with some room.
  const spanOf = (panel) => {
    let low = Infinity, high = -Infinity;
    for (const { x, y } of panel.curves)
      for (let i = search(x, range[0]); i < x.length && x[i] <= range[1]; i++)
        if (y[i] !== null && (!panel.log || y[i] > 0)) {
          low = Math.min(low, y[i]);
          high = Math.max(high, y[i]);
        }
    if (panel.cap !== null && panel.cap > low) high = Math.min(high, panel.cap);
    if (panel.floor !== null) low = panel.floor;
    if (low > high) [low, high] = [1, 2];
    if (panel.log) return [low / 1.15, high * 1.15];
    const room = 0.05 * (high - low) || 0.05 * Math.abs(high) || 1;
    return [panel.floor === null ? low - room : low, high + room];
  };

  // Where steps and values are on a canvas, and which step is at a place on it.
  const scalesOf = (panel, canvas) => {
    const [low, high] = spanOf(panel), to = panel.log ? Math.log : (value) => value;
    const width = canvas.clientWidth - EDGE.left - EDGE.right;
    const height = canvas.clientHeight - EDGE.top - EDGE.bottom;
    return {
      low, high, width, height,
      x: (step) => EDGE.left + ((step - range[0]) / (range[1] - range[0])) * width,
      y: (value) => EDGE.top + ((to(high) - to(value)) / (to(high) - to(low))) * height,
      step: (place) => {
        const share = Math.min(1, Math.max(0, (place - EDGE.left) / width));
        return Math.round(range[0] + share * (range[1] - range[0]));
      },
    };
  };

  const drawAxes = (pen, panel, scales) => {
    const bottom = EDGE.top + scales.height;
    pen.strokeStyle = PALE;
    pen.fillStyle = INK;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const tick of ticksOf(scales.low, scales.high, panel.log)) {
      pen.strokeRect(EDGE.left, scales.y(tick), scales.width, 0);
      pen.fillText(short(tick), EDGE.left - 6, scales.y(tick));
    }
    pen.textAlign = "center";
    for (const tick of ticksOf(...range, false).filter(Number.isInteger)) {
      pen.strokeRect(scales.x(tick), EDGE.top, 0, scales.height);
      pen.fillText(tick.toLocaleString("en"), scales.x(tick), bottom + 12);
    }
  };

  const drawCurve = (pen, curve, scales) => {
    const { width = 1, alpha = 1, dash = [] } = LOOKS[curve.look];
    const bottom = EDGE.top + scales.height;
    pen.strokeStyle = pen.fillStyle = curve.color;
    pen.lineWidth = width;
    pen.globalAlpha = alpha;
    pen.setLineDash(dash);
    pen.beginPath();
    let joined = false;
    // One point beyond each edge, so that lines go on to it.
    const first = Math.max(0, search(curve.x, range[0]) - 1);
    const last = Math.min(curve.x.length - 1, search(curve.x, range[1]) + 1);
    for (let i = first; i <= last; i++) {
      const x = scales.x(curve.x[i]), y = scales.y(curve.y[i]);
      if (curve.look === "resumes") {
        pen.moveTo(x, EDGE.top);
        pen.lineTo(x, bottom);
      } else if (curve.look === "marks") {
        pen.fillRect(x - 2, bottom - 8, 4, 8);
      } else if (curve.y[i] === null || !Number.isFinite(y)) {
        joined = false;
      } else {
        if (joined) pen.lineTo(x, y); else pen.moveTo(x, y);
        if (curve.look === "dots" || curve.x.length === 1) pen.fillRect(x - 3, y - 3, 6, 6);
        joined = true;
      }
    }
    pen.stroke();
    pen.globalAlpha = 1;
    pen.setLineDash([]);
  };

  // What the curves are at the cursor, below the panel: there it hides none of them.
  const tell = (panel, scales, words) => {
    words.replaceChildren();
    const add = (text, color) => {
      const span = words.appendChild(document.createElement("span"));
      span.textContent = text;
      span.style.color = color;
    };
    if (cursor !== null) add("step " + cursor.toLocaleString("en"), INK);
    for (const { label, color, x, y } of panel.curves) {
      if (cursor === null) { add(label, color); continue; }
      const after = search(x, cursor);
      const near = after > 0 && !(x[after] - cursor < cursor - x[after - 1]) ? after - 1 : after;
      if (Math.abs(scales.x(x[near]) - scales.x(cursor)) <= 6)
        add(y[near] === null ? label : label + " " + short(y[near]), color);
    }
  };

  const drawPanel = ({ panel, canvas, words }) => {
    const sharp = window.devicePixelRatio || 1, pen = canvas.getContext("2d");
    canvas.width = canvas.clientWidth * sharp;
    canvas.height = canvas.clientHeight * sharp;
    pen.scale(sharp, sharp);
    pen.font = "12px system-ui, sans-serif";
    const scales = scalesOf(panel, canvas);
    drawAxes(pen, panel, scales);
    pen.save();
    pen.beginPath();
    pen.rect(EDGE.left, EDGE.top - 4, scales.width + 4, scales.height + 4);
    pen.clip();
    for (const curve of panel.curves) drawCurve(pen, curve, scales);
    if (dragged !== null) {
      const from = scales.x(dragged);
      pen.fillStyle = SHADE;
      pen.fillRect(from, EDGE.top, scales.x(cursor) - from, scales.height);
    }
    pen.restore();
    if (cursor !== null) {
      pen.strokeStyle = INK;
      pen.lineWidth = 0.8;
      pen.strokeRect(scales.x(cursor), EDGE.top, 0, scales.height);
    }
    tell(panel, scales, words);
  };

  const place = document.getElementById("panels");
  const drawn = panels.map((panel) => {
    const box = place.appendChild(document.createElement("div"));
    box.appendChild(document.createElement("h3")).textContent = panel.title;
    const canvas = box.appendChild(document.createElement("canvas"));
    return { panel, canvas, words: box.appendChild(document.createElement("p")) };
  });
  const draw = () => drawn.forEach(drawPanel);
  const reset = () => { range = whole; dragged = null; draw(); };

  for (const { panel, canvas } of drawn) {
    canvas.addEventListener("pointerdown", (event) => {
      cursor = dragged = scalesOf(panel, canvas).step(event.offsetX);
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      cursor = scalesOf(panel, canvas).step(event.offsetX);
      draw();
    });
    canvas.addEventListener("pointerup", () => {
      if (dragged !== null && Math.abs(cursor - dragged) >= 2)
        range = [Math.min(cursor, dragged), Math.max(cursor, dragged)];
      dragged = null;
      draw();
    });
    canvas.addEventListener("pointerleave", () => { cursor = dragged = null; draw(); });
    canvas.addEventListener("dblclick", reset);
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") reset(); });
  window.addEventListener("resize", draw);

  place.hidden = document.getElementById("hint").hidden = false;
  try {
    draw();
    document.getElementById("picture").hidden = true;
  } catch (error) {
    place.hidden = document.getElementById("hint").hidden = true;
    throw error;
  }
})();
