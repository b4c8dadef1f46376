// Draws every chart of the page. Expressions are interpreted (ast): the page's policy allows no code made of text.
const ERRORS = 1; // the level of Vega's log: it warns of every layer that is empty
const rowsOf = ({ names, values }) => {
  const columns = values.map(column => Array.isArray(column) ? column : column.codes.map(code => code === null ? null : column.words[code]));
  return columns[0].map((_, row) => Object.fromEntries(names.map((name, n) => [name, columns[n][row]])));
};
for (const figure of document.querySelectorAll(".chart")) {
  const { spec, data } = JSON.parse(figure.querySelector("script").textContent);
  spec.datasets = Object.fromEntries(Object.entries(data).map(([name, columns]) => [name, rowsOf(columns)]));
  const [view, bind] = [".view", ".controls"].map(name => figure.querySelector(name));
  vegaEmbed(view, spec, { ast: true, renderer: "svg", actions: false, tooltip: { theme: "page" }, bind, logLevel: ERRORS })
    .then(() => figure.classList.add("drawn"))
    .catch(error => { view.textContent = `This chart can't be drawn: ${error.message}`; });
}
