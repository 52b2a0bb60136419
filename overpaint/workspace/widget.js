// A row for each patch (a switch and a strength), and under them the pictures. The kernel draws whenever `patches` is set.
function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function render({ model, el }) {
  const rows = element("div", { className: "op-rows" });
  const sheet = element("div", { className: "op-sheet" });
  const problem = element("p", { className: "op-problem", role: "alert" });
  const root = element("div", { className: "op-widget" }, rows, problem, sheet);
  el.append(root);

  function change(id, values) {
    root.classList.add("op-busy");
    model.set("patches", model.get("patches").map((each) => (each.id === id ? { ...each, ...values } : each)));
    model.save_changes();
  }

  function row(patch) {
    const on = element("input", { type: "checkbox", checked: patch.on });
    const strength = element("input", { type: "range", value: patch.strength, ariaLabel: `Strength of ${patch.concept}` });
    Object.assign(strength, { min: Math.min(0, patch.strength), max: Math.max(2, patch.strength), step: 0.05 });
    strength.value = patch.strength; // once its limits are set
    const shown = element("output", {}, String(patch.strength));
    on.addEventListener("change", () => change(patch.id, { on: on.checked }));
    strength.addEventListener("input", () => (shown.textContent = strength.value));
    strength.addEventListener("change", () => change(patch.id, { strength: Number(strength.value) }));
    const label = element("label", {}, on, ` ${patch.concept} `, element("small", {}, patch.about));
    return element("div", { className: "op-row" }, label, element("span", {}, strength, shown));
  }

  function showPatches() {
    const shown = model.get("patches");
    const ids = shown.map((each) => each.id).join();
    if (rows.dataset.ids !== ids) {
      rows.dataset.ids = ids;
      rows.replaceChildren(...shown.map(row));
    }
  }

  function showPictures() {
    root.classList.remove("op-busy");
    problem.textContent = model.get("problem");
    sheet.replaceChildren(
      ...model.get("rows").map(({ prompt, pictures }) => {
        const figures = pictures.map(({ column, source }) =>
          element("figure", {}, element("img", { src: source, alt: `${prompt}; ${column}` }), element("figcaption", {}, column)),
        );
        return element("div", {}, element("p", {}, prompt), element("div", { className: "op-figures" }, ...figures));
      }),
    );
  }

  model.on("change:patches", showPatches);
  model.on("change:rows change:problem", showPictures);
  showPatches();
  showPictures();
}

export default { render };
