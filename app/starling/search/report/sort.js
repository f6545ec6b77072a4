"use strict";
// A click on a heading sorts its table by that column, a second click the other way; the first rows stay visible.
for (const table of document.querySelectorAll("table.sortable")) {
  const [shown, rest] = table.tBodies;
  const size = shown.rows.length;
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const x = Number(a), y = Number(b);
    if (a === "" || b === "") return (a === "") - (b === "");
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "sort by this column";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...shown.rows, ...(rest ? rest.rows : [])];
      rows.sort((p, q) => (down ? -1 : 1) * compare(value(p, column), value(q, column)));
      rows.forEach((row, place) => (place < size || !rest ? shown : rest).append(row));
    });
  });
}
