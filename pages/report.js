// A report's page: tables sort by a click on a column, a number shows how it was made, a picture
// is enlarged.
"use strict";

// [[a row's name, [{setting: value}, of each file]]]; two rows may have one name
const rows = JSON.parse(document.getElementById("data").textContent);
const dialog = document.getElementById("more");

function button(cell, act) {
  const found = document.createElement("button");
  found.append(...cell.childNodes);
  found.addEventListener("click", act);
  cell.append(found);
}

function open(title, content) {
  document.getElementById("more-title").textContent = title;
  dialog.querySelector(".content").replaceChildren(content);
  dialog.showModal();
}


// ---------------------------------------------------------------------------------------------
// Tables

function value(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace(/,/g, ""));
  return Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b);
  return typeof a === "number" ? -1 : 1;      // what was not measured comes after the numbers
}

function sort(table, column) {
  const title = table.tHead.rows[0].cells[column];
  const down = title.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  title.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const sign = down ? -1 : 1;
  body.append(...[...body.rows].sort((a, b) => sign * compare(value(a, column), value(b, column))));
}

function settings(files) {
  const table = document.createElement("table");
  for (const name of Object.keys(Object.assign({}, ...files))) {
    const row = table.insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head);
    for (const file of files) {
      const said = file[name];
      row.insertCell().textContent = typeof said === "string" ? said : JSON.stringify(said);
    }
  }
  return table;
}

for (const table of document.querySelectorAll("main table")) {
  const titles = [...table.tHead.rows[0].cells];
  const left = [...rows];
  for (const row of table.tBodies[0].rows) {
    const name = row.cells[0].textContent;
    const k = left.findIndex((other) => other[0] === name);
    if (k < 0) continue;
    const files = left.splice(k, 1)[0][1];
    for (const [column, cell] of [...row.cells].entries()) {
      const title = `${name}: ${titles[column].textContent} ${cell.textContent}`;
      if (column && /[0-9]/.test(cell.textContent) && titles[column].textContent !== "paper")
        button(cell, () => open(title, settings(files)));
    }
  }
  titles.forEach((title, column) => button(title, () => sort(table, column)));
}


// ---------------------------------------------------------------------------------------------
// Pictures

for (const figure of document.querySelectorAll(".figure")) {
  figure.addEventListener("click", () => {
    const image = figure.querySelector("img").cloneNode();
    const room = innerWidth * 0.9 / image.naturalWidth;
    image.style.width = `${image.naturalWidth * Math.max(1, Math.floor(room))}px`;
    open(image.alt, image);
  });
}
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();        // beside it
});
