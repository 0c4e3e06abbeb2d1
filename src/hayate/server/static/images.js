// Images for the next message: chosen, pasted or dropped; previewed, removable; as data: URLs.
import { $, el } from "./dom.js";
import { notify } from "./notice.js";
import { t } from "./strings.js";

const TYPES = /^image\/(png|jpeg|webp|gif|bmp)$/;
let allowed = false;
let attached = []; // data: URLs

/** Show or hide what adds images. */
export function allow(images) {
  allowed = images;
  $("attach").hidden = !images;
}

/** Those attached, which are then no longer. */
export function take() {
  const taken = attached;
  attached = [];
  draw();
  return taken;
}

export const any = () => attached.length > 0;

async function add(files) {
  for (const file of files) {
    if (!allowed) notify(t("noImages"), true);
    else if (!TYPES.test(file.type)) notify(t("badImage", { name: file.name }), true);
    else attached.push(await dataUrl(file));
  }
  draw();
}

const dataUrl = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

function draw() {
  $("previews").hidden = !attached.length;
  $("previews").replaceChildren(
    ...attached.map((url, i) => {
      const drop = () => {
        attached.splice(i, 1);
        draw();
        $("prompt").focus();
      };
      const remove = el("button", { type: "button", "aria-label": t("removeImage"), click: drop }, "×");
      return el("li", {}, el("img", { src: url, alt: t("attachedImage") }), remove);
    }),
  );
}

export function start() {
  $("attach").addEventListener("click", () => $("image-file").click());
  $("image-file").addEventListener("change", async () => {
    await add([...$("image-file").files]);
    $("image-file").value = "";
    $("prompt").focus();
  });
  $("prompt").addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    add(files);
  });
  const box = document.querySelector(".box");
  const hasFiles = (event) => [...event.dataTransfer.types].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    box.classList.add("drop");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? box.classList.remove("drop"));
  document.addEventListener("drop", (event) => {
    box.classList.remove("drop");
    if (!hasFiles(event)) return;
    event.preventDefault();
    add([...event.dataTransfer.files]);
  });
}
