// Markdown to a tree of plain objects {tag, children, href?, language?}; strings in it are text, never markup.
// Paragraphs, headings, lists, quotes, tables, rules, fenced code; emphasis, code and links inside. HTML is text.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(\s+|$)/;
const QUOTE = /^ {0,3}>\s?/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const LINK = /^(https?:\/\/|mailto:)/i;
const MAX_DEPTH = 8; // of lists and quotes in one another; deeper ones are text

const node = (tag, children, more = {}) => ({ tag, children, ...more });

/** The blocks of a text. Unclosed code runs to the end, as it does while an answer streams. */
export function parse(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    let match;
    if (!line.trim()) {
      i++;
    } else if ((match = FENCE.exec(line))) {
      [match, i] = code(lines, i, match);
      blocks.push(match);
    } else if ((match = HEADING.exec(line))) {
      // The page has h1 and h2 already.
      blocks.push(node(`h${Math.min(match[1].length + 2, 6)}`, inline(title(line.slice(match[0].length)))));
      i++;
    } else if (RULE.test(line)) {
      blocks.push(node("hr", []));
      i++;
    } else if (QUOTE.test(line) && depth < MAX_DEPTH) {
      const inner = [];
      while (i < lines.length && QUOTE.test(lines[i])) inner.push(lines[i++].replace(QUOTE, ""));
      blocks.push(node("blockquote", parse(inner.join("\n"), depth + 1)));
    } else if (ITEM.test(line) && depth < MAX_DEPTH) {
      [match, i] = list(lines, i, depth);
      blocks.push(match);
    } else if (line.includes("|") && lines[i + 1]?.includes("-") && DIVIDER.test(lines[i + 1])) {
      [match, i] = table(lines, i);
      blocks.push(match);
    } else {
      const begin = i++;
      while (i < lines.length && lines[i].trim() && !startsBlock(lines[i])) i++;
      blocks.push(node("p", inline(lines.slice(begin, i).join("\n"))));
    }
  }
  return blocks;
}

/** A heading's text without the #s that may close it. By hand: a pattern that looks for the end takes quadratic time. */
function title(text) {
  text = text.trim();
  let end = text.length;
  while (text[end - 1] === "#") end--;
  return text.slice(0, end).trimEnd();
}

const startsBlock = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

function code(lines, begin, [, fence, language]) {
  const close = new RegExp(`^\\s*${fence[0]}{${fence.length},}\\s*$`);
  let end = begin + 1;
  while (end < lines.length && !close.test(lines[end])) end++;
  const text = lines.slice(begin + 1, end).join("\n");
  return [node("code-block", [text], { language }), end + 1];
}

function list(lines, begin, depth) {
  const [, indent, mark] = ITEM.exec(lines[begin]);
  const ordered = /\d/.test(mark);
  const items = [];
  let i = begin;
  while (i < lines.length) {
    const match = ITEM.exec(lines[i]);
    if (!match || match[1].length > indent.length + 1 || /\d/.test(match[2]) !== ordered) break;
    if (match[1].length < indent.length || RULE.test(lines[i])) break;
    const width = match[0].length;
    const inner = [lines[i++].slice(width)];
    while (i < lines.length) {
      const blank = !lines[i].trim();
      const inside = /^ */.exec(lines[i])[0].length > indent.length;
      // A blank line belongs to the item when what follows is indented.
      if (blank ? !/^\s/.test(lines[i + 1] ?? "") : !inside && (startsBlock(lines[i]) || !lines[i - 1].trim())) break;
      inner.push(lines[i].replace(new RegExp(`^ {0,${width}}`), ""));
      i++;
    }
    const blocks = parse(inner.join("\n"), depth + 1);
    if (blocks[0]?.tag === "p") blocks.splice(0, 1, ...blocks[0].children);
    items.push(node("li", blocks));
    while (i < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1] ?? "")) i++;
  }
  const start = parseInt(mark, 10);
  return [node(ordered ? "ol" : "ul", items, ordered && start !== 1 ? { start } : {}), i];
}

function table(lines, begin) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => node("tr", cells(line).map((cell) => node(tag, inline(cell))));
  const rows = [row(lines[begin], "th")];
  let i = begin + 2;
  while (i < lines.length && lines[i].includes("|")) rows.push(row(lines[i++], "td"));
  return [node("table", rows), i];
}

// An end is looked for only so far and so often, so that no text takes quadratic time.
const REACH = 2000;
const MAX_ENDS = 20;
const FORMS = [
  [/(?<!`)`{1,8}(?!`)/y, codeSpan],
  [/\[/y, link],
  [/(\*\*|__)(?=\S)/y, (text, at, match) => emphasis(text, at, match[0], "strong")],
  [/~~(?=\S)/y, (text, at) => emphasis(text, at, "~~", "del")],
  [/[*_](?=\S)/y, (text, at, match) => emphasis(text, at, match[0], "em")],
  [/https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}*_、。]/y, (text, at, match) => [node("a", [match[0]], { href: match[0] }), at + match[0].length]],
];

/** The inside of a paragraph: texts and nodes. */
export function inline(text, depth = 0) {
  const parts = [];
  let plain = "";
  for (let i = 0; i < text.length; ) {
    if (text[i] === "\\" && /[\\`*_{}[\]()#+.!~|>-]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
      continue;
    }
    const found = "`[*_~h".includes(text[i]) && depth < MAX_DEPTH ? special(text, i, depth) : null;
    if (found) {
      if (plain) parts.push(plain);
      plain = "";
      parts.push(found[0]);
      i = found[1];
    } else {
      plain += text[i++];
    }
  }
  return plain ? [...parts, plain] : parts;
}

function special(text, at, depth) {
  for (const [pattern, read] of FORMS) {
    pattern.lastIndex = at;
    const match = pattern.exec(text);
    const found = match && read(text, at, match, depth);
    if (found) {
      // Children are still text where a form holds others.
      found[0].children = found[0].children.flatMap((c) => (c.inner ? inline(c.inner, depth + 1) : [c]));
      return found;
    }
  }
  return null;
}

function codeSpan(text, at, [ticks]) {
  const begin = at + ticks.length;
  const near = text.slice(begin, begin + REACH);
  const close = new RegExp(`(?<!\`)${ticks}(?!\`)`).exec(near);
  return close && [node("code", [near.slice(0, close.index).trim()]), begin + close.index + ticks.length];
}

function link(text, at) {
  const match = /^\[([^[\]]+)\]\(\s*<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\s*\)/.exec(text.slice(at, at + REACH));
  if (!match || !LINK.test(match[2])) return null; // javascript: and the like stay text
  return [node("a", [{ inner: match[1] }], { href: match[2] }), at + match[0].length];
}

function emphasis(text, at, mark, tag) {
  const inWord = (i) => /[\p{L}\p{N}]/u.test(text[i] ?? "");
  if (mark[0] === "_" && inWord(at - 1)) return null;
  const near = text.slice(at + mark.length, at + REACH);
  let end = 0;
  for (let i = 0; i < MAX_ENDS && (end = near.indexOf(mark, end + 1)) > 0; i++) {
    const doubled = mark.length === 1 && (near[end + 1] === mark || near[end - 1] === mark);
    if (mark.length === 2 && near[end + 2] === mark[0]) end++; // of ***, the last two
    const after = at + mark.length + end + mark.length;
    if (/\s/.test(near[end - 1]) || doubled || (mark[0] === "_" && inWord(after))) continue;
    return [node(tag, [{ inner: near.slice(0, end) }]), after];
  }
  return null;
}
