"use strict";
// Sorts and sifts the groups that are in the page; all of their text is there already, so that it reads without this too.
{
  const form = document.querySelector("form");
  const main = document.querySelector("main");
  const groups = [...main.children].map((node) => ({
    node,
    answers: [...node.querySelectorAll("article")],
    text: node.textContent.toLowerCase(),
  }));

  const bound = (name, side) => {
    const value = form.elements[name + side].value;
    return value === "" ? (side ? Infinity : -Infinity) : Number(value);
  };

  // What has no such figure is found where nothing is asked of it.
  const within = (node, name) => {
    const [low, high] = [bound(name, 0), bound(name, 1)];
    if (low === -Infinity && high === Infinity) return true;
    const value = Number(node.dataset[name]);
    return low <= value && value <= high;
  };

  const sift = () => {
    const words = form.elements.text.value.toLowerCase();
    const cut = form.elements.cut.checked;
    let found = 0;
    for (const group of groups) {
      let some = 0;
      const open = within(group.node, "step") && group.text.includes(words);
      for (const one of group.answers) {
        const fits = open && within(one, "reward") && within(one, "advantage") && (!cut || one.dataset.cut === "1");
        one.hidden = !fits;
        some += fits;
      }
      group.node.hidden = !some;
      found += some;
    }
    document.getElementById("found").textContent = found + " answers";
  };

  const sort = () => {
    const [, sign, key] = form.elements.sort.value.match(/^(-?)(.*)$/);
    const value = (group) => Number(group.node.dataset[key]) * (sign ? -1 : 1);
    groups.sort((a, b) => value(a) - value(b));
    main.append(...groups.map((group) => group.node));
  };

  form.addEventListener("input", sift);
  form.elements.sort.addEventListener("change", sort);
  form.addEventListener("submit", (event) => event.preventDefault());
  sift();
}
