"use strict";
// The chat page: asks for answers, shows them as they are written, sends votes. Every text is put in as text, never as
// HTML. The token comes in the address after "#", which no browser sends anywhere, and stays in this tab.

const WORDS = {
  en: {
    anew: "New conversation", send: "Send", stop: "Stop", two: "Two answers to compare", who: "Name (optional)",
    write: "Write something", first: "The first is better", second: "The second is better", equal: "Equally good", good: "Good",
    bad: "Bad", edit: "Write a better one", save: "Keep this", again: "Other answers", undo: "Take it back",
    kept: "Kept. Thank you.", quarantined: "Kept; somebody will look at it before it is used. Thank you.",
    gone: "Taken back: it is deleted.", dry: "Nothing was kept: you have not agreed to it below.",
    cut: "cut at the limit", token: "This page needs the address with the token that was printed when the server began.",
    guide: "What is a good answer?", other: "中文", lost: "The server cannot be reached.",
    guidance: "Helpful: it does what was asked, briefly and clearly.\nTruthful: it makes nothing up, and says what it does not know.\nHarmless: it hurts nobody and helps nobody to.\nWhere these pull apart, truth and harm weigh more than help. If both answers are as good, say so: a tie is a judgement too.\nExample: to \u201cHow long do I boil an egg?\u201d, \u201cAbout eight minutes for a firm yolk.\u201d is better than a page about hens.",
  },
  zh: {
    anew: "新对话", send: "发送", stop: "停止", two: "给出两个回答以便比较", who: "姓名（可不填）", write: "写点什么",
    first: "第一个更好", second: "第二个更好", equal: "一样好", good: "好", bad: "不好", edit: "写一个更好的", save: "保存",
    again: "换别的回答", undo: "撤回", kept: "已保存，谢谢。", quarantined: "已保存，审核后才会使用，谢谢。",
    gone: "已撤回并删除。", dry: "没有保存：您尚未在下方表示同意。", cut: "到达长度上限，被截断",
    token: "请使用启动服务器时打印的、带令牌的地址打开本页。", guide: "什么是好的回答？", other: "English",
    lost: "无法连接服务器。",
    guidance: "有帮助：照要求做，简短清楚。\n真实：不编造，不知道就说不知道。\n无害：不伤害人，也不帮人去伤害。\n三者冲突时，真实与无害重于有帮助。两个回答一样好就选\u201c一样好\u201d:平局也是判断。\n例如问\u201c鸡蛋要煮多久？\u201d,\u201c想要全熟大约八分钟。\u201d好过一整页关于母鸡的话。",
  },
};
const at = (id) => document.getElementById(id);
let language = (navigator.language || "en").startsWith("zh") ? "zh" : "en";
let turns = [], known = null, running = null;
let undecided = null;  // ends a comparison that nobody decides

const say = (name) => WORDS[language][name];

function token() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem("token") || "";
}

function tell(text, bad = false) {
  at("told").textContent = text;
  at("told").className = bad ? "bad" : "";
}

function make(tag, name, text = "") {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}

function button(name, pressed) {
  const element = make("button", "", say(name));
  element.type = "button";
  element.dataset.say = name;
  element.addEventListener("click", pressed);
  return element;
}

function translate() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = say(element.dataset.say);
  at("words").placeholder = say("write");
  at("language").textContent = say("other");
  if (known) at("agreed").textContent = known.consent[language];
}

async function call(path, method, body, signal) {
  const headers = { authorization: `Bearer ${token()}` };
  if (body) headers["content-type"] = "application/json";
  let reply;
  try {
    reply = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(say("lost"));
  }
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  throw new Error(reply.status === 401 ? say("token") : told?.error?.message || `HTTP ${reply.status}`);
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

async function answer() {
  const count = at("two").checked ? 2 : 1, talk = turns;
  const row = make("div", "answers");
  const written = Array.from({ length: count }, () => ({ text: "", finish: null, card: make("div", "answer") }));
  for (const one of written) {
    one.words = make("p", "");
    one.card.append(one.words);
    row.append(one.card);
  }
  at("talk").append(row);
  const mine = new AbortController();
  busy(mine);
  let id = null;
  try {
    const asked = { messages: turns, n: count, stream: true };
    for await (const chunk of events(await call("v1/chat/completions", "POST", asked, mine.signal))) {
      if (chunk.error) throw new Error(chunk.error.message);
      id = chunk.id;
      for (const choice of chunk.choices) {
        const one = written[choice.index];
        one.text += choice.delta.content || "";
        one.finish = choice.finish_reason || one.finish;
        one.words.textContent = one.text;
      }
      row.scrollIntoView({ block: "end" });
    }
    tell("");
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message, true);
  }
  if (running === mine) busy(null);
  if (turns !== talk) return;  // a new conversation has begun
  for (const one of written) if (one.finish === "length") one.card.append(make("span", "cut", say("cut")));
  if (written.some((one) => one.finish)) offer(id, row, written);
  else if (written[0].text) settle(written, 0);
  else {
    row.remove();
    at("words").value = turns.pop()?.content || "";
    at("talk").lastElementChild?.remove();
  }
}

// The conversation goes on with answer number `index`.
function settle(written, index) {
  turns.push({ role: "assistant", content: written[index].text });
  written.forEach((one, number) => {
    if (written.length > 1) one.card.classList.add(number === index ? "chosen" : "passed");
  });
  at("words").focus();
}

function offer(id, row, written) {
  const votes = make("div", "votes");
  const one = written.length === 1;
  const choose = (index, said) => async () => {
    undecided = null;
    votes.replaceChildren();
    if (!one) settle(written, index);
    await vote(id, said, votes);
  };
  undecided = () => {
    votes.remove();
    if (!one) settle(written, 0);
  };
  const edit = () => {
    const text = make("textarea", "");
    text.value = written[0].text;
    written[0].card.append(text);
    votes.replaceChildren(button("save", async () => {
      if (!text.value.trim()) return;
      undecided = null;
      written[0].text = written[0].words.textContent = text.value;
      turns[turns.length - 1] = { role: "assistant", content: text.value };
      text.remove();
      votes.replaceChildren();
      await vote(id, { better: text.value }, votes);
    }));
    text.focus();
  };
  const again = async () => {
    undecided = null;
    if (one) turns.pop();
    row.remove();
    votes.remove();
    await answer();
  };
  if (one) {
    settle(written, 0);
    if (known.feedback) {
      votes.append(button("good", choose(0, { good: true })), button("bad", choose(0, { good: false })), button("edit", edit));
    }
  } else {
    votes.append(button("first", choose(0, { ranks: [0, 1] })), button("second", choose(1, { ranks: [1, 0] })));
    votes.append(button("equal", choose(0, { ranks: [0, 0] })));
  }
  votes.append(button("again", again));
  row.after(votes);
  votes.scrollIntoView({ block: "end" });
}

async function vote(id, said, votes) {
  if (!known.feedback) return;
  if (!at("consent").checked) return tell(say("dry"));
  try {
    const sent = { id, annotator: at("who").value.trim(), consent: language, ...said };
    const kept = await (await call("v1/feedback", "POST", sent)).json();
    tell(say(kept.state));
    votes.replaceChildren(button("undo", async () => {
      try {
        await call(`v1/feedback/${kept.id}`, "DELETE");
        tell(say("gone"));
        votes.replaceChildren();
      } catch (error) {
        tell(error.message, true);
      }
    }));
  } catch (error) {
    tell(error.message, true);
  }
}

function busy(controller) {
  running = controller;
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const words = at("words").value.trim();
  if (!words || running) return;
  // What nobody decided: the conversation goes on with the first answer.
  undecided?.();
  undecided = null;
  turns.push({ role: "user", content: words });
  at("words").value = "";
  at("talk").append(make("div", "user", words));
  await answer();
});
at("words").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("anew").addEventListener("click", () => {
  running?.abort();
  turns = [];
  undecided = null;
  at("talk").replaceChildren();
  tell("");
});
at("language").addEventListener("click", () => {
  language = language === "en" ? "zh" : "en";
  translate();
});

token();
translate();
call("v1/models", "GET").then((reply) => reply.json()).then((told) => {
  known = told.data[0];
  at("model").textContent = known.id;
  for (const element of document.querySelectorAll("[data-feedback]")) element.hidden = !known.feedback;
  translate();
}).catch((error) => tell(error.message, true));
