// A click on the head of a column of a table with the class "sortable" sorts its rows; a second click turns them round.
document.addEventListener("DOMContentLoaded", () => {
  const value = (row, column) => row.cells[column].textContent.trim();
  const units = { kB: 1e3, MB: 1e6, GB: 1e9 };
  const number = (text) => {
    const match = /^([-\d.,e]+)\s*(kB|MB|GB)?/.exec(text);
    return match ? parseFloat(match[1].replaceAll(",", "")) * (units[match[2]] ?? 1) : NaN;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.tabIndex = 0;
      const sort = () => {
        const down = head.getAttribute("aria-sort") !== "descending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => {
          const [x, y] = [value(a, column), value(b, column)];
          const order = isNaN(number(x)) || isNaN(number(y)) ? y.localeCompare(x) : number(y) - number(x);
          return down ? order : -order;
        });
        table.tBodies[0].append(...rows);
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
    });
  }
});
