"use strict";

// A click on a column's head sorts the table; cells without a value stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  for (const head of heads) {
    const button = head.querySelector("button");
    button.addEventListener("click", () => {
      const sorted = head.getAttribute("aria-sort");
      const descends = sorted === "none" ? "descends" in button.dataset : sorted === "ascending";
      const sign = descends ? -1 : 1;
      const rows = [...body.rows].map((row) => ({ row, cell: row.cells[head.cellIndex] }));
      rows.sort((a, b) => compare(a.cell, b.cell, sign));
      body.append(...rows.map(({ row }) => row));
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", descends ? "descending" : "ascending");
    });
  }
}

function compare(a, b, sign) {
  const [x, y] = [key(a), key(b)];
  if (x === null || y === null) return (x === null) - (y === null);
  const order = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
  return sign * order;
}

function key(cell) {
  if ("value" in cell.dataset) return Number(cell.dataset.value);
  return cell.textContent === "–" ? null : cell.textContent;
}

// A button of the legend hides all marks and pictures of its run.
for (const button of document.querySelectorAll("[data-toggle]")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const mark of document.querySelectorAll(`[data-run="${button.dataset.toggle}"]`)) {
      mark.toggleAttribute("hidden", !shown);
    }
  });
}

// The values of all curves at the pointer. They are read back from the paths that are drawn.
const NEAR = 4;
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const x = axis(svg.dataset.x);
  const y = axis(svg.dataset.y);
  const curves = [...svg.querySelectorAll("g[data-run]")].flatMap((group) => {
    const line = group.querySelector(".line");
    if (line === null) return [];
    const points = line.getAttribute("d").split(/[ML]/).slice(1);
    return [{ group, points: points.map((point) => point.split(",").map(Number)) }];
  });
  const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const box = document.createElement("div");
  cross.setAttribute("class", "cross");
  box.className = "readout";
  svg.append(cross);
  svg.after(box);
  hide();
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const bounds = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / bounds.width;
    const at = (event.clientX - bounds.left) * scale;
    // Of a curve that has ended or not begun there is no value.
    const visible = curves.filter(
      ({ group, points }) =>
        !group.hasAttribute("hidden") && points.length &&
        points[0][0] - NEAR <= at && at <= points[points.length - 1][0] + NEAR,
    );
    if (at < x.start || at > x.end || visible.length === 0) return hide();
    const lines = visible.map(({ group, points }) => {
      const near = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      return row(group, name(group.dataset.run), shown(y.value(near[1])));
    });
    box.replaceChildren(row(null, "iteration", String(Math.max(0, Math.round(x.value(at))))), ...lines);
    for (const end of ["x1", "x2"]) cross.setAttribute(end, at);
    cross.setAttribute("y1", y.start);
    cross.setAttribute("y2", y.end);
    cross.removeAttribute("hidden");
    box.hidden = false;
    const left = event.clientX - bounds.left;
    const room = bounds.width - box.offsetWidth;
    box.style.left = `${Math.max(0, left + 14 <= room ? left + 14 : left - 14 - box.offsetWidth)}px`;
    box.style.top = `${bounds.top - box.offsetParent.getBoundingClientRect().top + 8}px`;
  });

  function hide() {
    cross.setAttribute("hidden", "");
    box.hidden = true;
  }
}

function axis(text) {
  const [start, end, low, high, logarithmic] = text.split(" ").map(Number);
  const value = (place) => {
    const part = (place - start) / (end - start);
    return logarithmic ? low * (high / low) ** part : low + part * (high - low);
  };
  return { start, end, value };
}

function name(run) {
  return document.querySelector(`[data-toggle="${run}"]`).textContent;
}

function shown(value) {
  return String(Number(value.toPrecision(3)));
}

function row(group, title, value) {
  const line = document.createElement("div");
  const label = document.createElement("span");
  const number = document.createElement("span");
  label.textContent = title;
  number.textContent = value;
  if (group !== null) {
    const dot = document.createElement("span");
    dot.className = `dot ${group.getAttribute("class")}`;
    label.prepend(dot);
  }
  line.append(label, number);
  return line;
}

// The sample under the pointer is framed in all pictures: it comes from the same noise.
for (const grids of document.querySelectorAll(".grids")) {
  const tiles = [...grids.querySelectorAll(".tiles")];
  const cursors = tiles.map((tile) => {
    const cursor = document.createElement("span");
    cursor.className = "cursor";
    cursor.hidden = true;
    tile.append(cursor);
    return cursor;
  });
  const hide = () => cursors.forEach((cursor) => (cursor.hidden = true));
  for (const tile of tiles) {
    const columns = Number(tile.dataset.columns);
    const rows = Number(tile.dataset.rows);
    tile.addEventListener("pointerleave", hide);
    tile.addEventListener("pointermove", (event) => {
      const bounds = tile.getBoundingClientRect();
      const column = Math.floor(((event.clientX - bounds.left) / bounds.width) * columns);
      const line = Math.floor(((event.clientY - bounds.top) / bounds.height) * rows);
      if (column < 0 || column >= columns || line < 0 || line >= rows) return hide();
      for (const cursor of cursors) {
        cursor.hidden = false;
        cursor.style.left = `${(100 * column) / columns}%`;
        cursor.style.top = `${(100 * line) / rows}%`;
        cursor.style.width = `${100 / columns}%`;
        cursor.style.height = `${100 / rows}%`;
      }
    });
  }
}
