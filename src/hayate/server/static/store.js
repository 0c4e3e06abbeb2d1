// Conversations in localStorage, one entry each: {id, title, updated, messages: [{role, text, images?, note?}]}.
const PREFIX = "hayate.chat.";

/** All of them, the latest first. */
export function list() {
  return Object.keys(localStorage)
    .filter((name) => name.startsWith(PREFIX))
    .map((name) => read(name))
    .filter(Boolean)
    .sort((a, b) => b.updated - a.updated);
}

function read(name) {
  try {
    const conversation = JSON.parse(localStorage.getItem(name));
    return Array.isArray(conversation.messages) ? conversation : null;
  } catch {
    return null;
  }
}

/** Not in the list until it is saved. */
export function create() {
  const random = crypto.getRandomValues(new Uint32Array(2));
  return { id: `${Date.now()}-${random.join("")}`, title: "", updated: 0, messages: [] };
}

/** False when there was no room for its images; the rest is then kept. */
export function save(conversation) {
  conversation.updated = Date.now();
  const name = PREFIX + conversation.id;
  try {
    localStorage.setItem(name, JSON.stringify(conversation));
    return true;
  } catch {
    const messages = conversation.messages.map(({ images, ...rest }) => rest);
    try {
      localStorage.setItem(name, JSON.stringify({ ...conversation, messages }));
    } catch {
      // Not even the text has room: it lives as long as the page.
    }
    return false;
  }
}

export function remove(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}
