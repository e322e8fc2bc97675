// Brings the page up to date while it is looked at; without it, the page reloads itself.
const SECONDS = 2;

async function update() {
  if (document.hidden || document.activeElement?.closest("form")) return;
  const answer = await fetch(location.href).catch(() => null);
  if (!answer?.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const main = document.querySelector("main");
  const open = [...main.querySelectorAll("details")].map((each) => each.open).reverse();
  const focused = document.activeElement?.getAttribute("href");
  const next = page.querySelector("main");
  // The newest cluster comes first: counted from the last, a place stays the same.
  [...next.querySelectorAll("details")].reverse().forEach((each, i) => { each.open = open[i] ?? false; });
  main.replaceWith(next);
  if (focused) next.querySelector(`a[href="${focused}"]`)?.focus({ preventScroll: true });
}

setInterval(update, SECONDS * 1000);
