"""The shell of a report: HTML that escapes by itself, style, content security policy and the Chinese words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Literal

Language = Literal["en", "zh"]
Say = Callable[[str], str]
"""A heading or label in the reader's language."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""No script, no network: a report can be opened and sent without a thought."""


class Html(str):
    """Text that is HTML already. Every other text is escaped when it is put inside an element."""

    __slots__ = ()


def el(tag: str, *children: str, **attributes: str) -> Html:
    """An element: `tag` is a name with classes, as in "p.note"; empty classes and attributes are left out."""
    name, *classes = tag.split(".")
    attributes = {"class": " ".join(filter(None, classes)), **attributes}
    written = "".join(f' {key}="{escape(value)}"' for key, value in attributes.items() if value)
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*parts: str) -> Html:
    """The parts one after another, what is not HTML escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def page(title: str, body: Html, language: Language) -> str:
    """A whole HTML document."""
    return (
        f'<!doctype html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"{el('title', title)}\n<style>{STYLE}</style>\n</head>\n<body>\n{el('main', body)}\n</body>\n</html>\n"
    )


STYLE = """
:root{--page:#f5f6f8;--card:#fff;--ink:#16202c;--dim:#5a6675;--line:#e2e6ec;--soft:#eef1f5;
--c0:#2459d3;--c1:#d4690a;--c2:#0b8468;--c3:#8b45c9;--ok:#0f7a58;--warn:#9a5b00;--stop:#bd2a2a;
--ok-soft:#e2f4ec;--warn-soft:#fdf0d9;--stop-soft:#fce5e5}
@media(prefers-color-scheme:dark){:root{--page:#0e1319;--card:#161d26;--ink:#e5eaf0;--dim:#97a3b2;--line:#28323e;
--soft:#1e2732;--c0:#74a2ff;--c1:#ffa24a;--c2:#4ecfae;--c3:#c896ff;--ok:#5fd3a8;--warn:#f2bd62;--stop:#ff8b8b;
--ok-soft:#143228;--warn-soft:#372a12;--stop-soft:#3d1d1f}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:36px 20px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:0;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:48px 0 14px;letter-spacing:-.01em}
h4{font-size:.95rem;margin:0;font-weight:650}
p{margin:.4em 0}.dim{color:var(--dim)}
.lead{font-size:1.02rem;color:var(--dim);max-width:72ch;margin:8px 0 0}
.eyebrow{font-size:.78rem;letter-spacing:.09em;text-transform:uppercase;color:var(--dim);margin:0 0 6px;font-weight:600}
code,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.88em;overflow-wrap:anywhere}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px;min-width:0}
.banner{border:1px solid var(--warn);background:var(--warn-soft);border-radius:12px;padding:12px 18px;margin:22px 0 0}
.banner b{color:var(--warn)}
.stages{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,205px),1fr));gap:12px;list-style:none;
padding:0;margin:0;counter-reset:n}
.stages li{position:relative;padding:12px 16px 14px;overflow:hidden;display:flex;flex-direction:column}
.stages li h4::before{counter-increment:n;content:counter(n) " · ";color:var(--dim);font-weight:500}
.stages .what{font-size:.82rem;color:var(--dim);line-height:1.35;margin:2px 0 10px}
.stages .foot{margin-top:auto;display:flex;justify-content:space-between;gap:8px;font-size:.85rem;align-items:center}
.stages .time{position:absolute;left:0;bottom:0;height:4px;background:var(--c0);opacity:.75}
.chip{display:inline-block;font-size:.76rem;font-weight:650;padding:1px 9px;border-radius:99px;white-space:nowrap;
background:var(--soft);color:var(--dim)}
.chip.ok{background:var(--ok-soft);color:var(--ok)}.chip.warn{background:var(--warn-soft);color:var(--warn)}
.chip.stop{background:var(--stop-soft);color:var(--stop)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,205px),1fr));gap:12px}
.tile .name{font-size:.85rem;color:var(--dim);margin:0}
.tile .big{font-size:1.6rem;font-weight:680;line-height:1.25;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile .big small{font-size:.95rem;font-weight:500;color:var(--dim);letter-spacing:0}
.tile .note{font-size:.83rem;color:var(--dim);margin:2px 0 0;line-height:1.4}
.tile.hero{grid-column:1/-1;display:grid;grid-template-columns:minmax(150px,auto) 1fr;gap:6px 34px;align-items:center}
.tile.hero .big{font-size:3rem;line-height:1.1}
.scale{position:relative;height:54px;margin:4px 0 0}
.scale i{position:absolute;display:block}
.scale .track,.scale .fill{top:12px;height:18px;border-radius:5px}
.scale .track{left:0;right:0;background:var(--soft)}.scale .fill{left:0;background:var(--c0);opacity:.85}
.scale .whisker{top:20px;height:2px;background:var(--ink)}
.scale .whisker::before,.scale .whisker::after{content:"";position:absolute;top:-6px;height:14px;width:2px;
background:var(--ink)}
.scale .whisker::before{left:-1px}.scale .whisker::after{right:-1px}
.scale .half{left:50%;top:4px;height:34px;border-left:2px dashed var(--dim)}
.scale span{position:absolute;top:37px;left:0;font-size:.78rem;color:var(--dim);white-space:nowrap}
.scale .centre{left:50%;transform:translateX(-50%)}.scale .right{left:auto;right:0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:12px}
.plot{margin:0;padding:14px 14px 12px}
.plot h4{display:flex;justify-content:space-between;gap:10px}
.plot h4 span{font-weight:500;font-size:.8rem;color:var(--dim)}
.legend{display:flex;flex-wrap:wrap;gap:1px 16px;font-size:.8rem;color:var(--dim);margin:3px 0 7px;
padding:0;list-style:none}
.legend li::before{content:"";display:inline-block;width:13px;height:3px;border-radius:2px;margin-right:6px;
vertical-align:middle;background:currentColor}
.legend li{font-variant-numeric:tabular-nums}.legend li span{color:var(--ink)}
.plot .note{font-size:.8rem;color:var(--dim);line-height:1.4;margin:6px 0 0}
.chart{display:block;width:100%;height:auto;overflow:visible}
.tick{font-size:11.5px;fill:var(--dim);font-variant-numeric:tabular-nums}.end{text-anchor:end}.middle{text-anchor:middle}
.flag{paint-order:stroke;stroke:var(--card);stroke-width:4px}
.grid{stroke:var(--line);stroke-width:1}.mark{stroke:var(--dim);stroke-width:1.2;stroke-dasharray:4 4}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}
.dot.c0,.tick.c0{fill:var(--c0)}.dot.c1,.tick.c1{fill:var(--c1)}
.dot.c2,.tick.c2{fill:var(--c2)}.dot.c3,.tick.c3{fill:var(--c3)}
.legend .c0{color:var(--c0)}.legend .c1{color:var(--c1)}.legend .c2{color:var(--c2)}.legend .c3{color:var(--c3)}
.at rect{fill:transparent}.met{opacity:0;pointer-events:none}.at:hover .met{opacity:1}
.met line{stroke:var(--dim);stroke-width:1}.ring{fill:var(--card);stroke-width:2.2}
.ring.c0{stroke:var(--c0)}.ring.c1{stroke:var(--c1)}.ring.c2{stroke:var(--c2)}.ring.c3{stroke:var(--c3)}
.wide{overflow-x:auto;padding:4px 6px}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th{text-align:left;font-weight:600;color:var(--dim);font-size:.8rem}
th,td{padding:8px 12px;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
.remedy{font-size:.83rem;font-weight:600;margin-top:2px}
td.number{font-variant-numeric:tabular-nums;white-space:nowrap}
.example{margin:0 0 12px;padding:0;overflow:hidden}
.example .prompt{padding:12px 18px;border-bottom:1px solid var(--line);font-weight:600;white-space:pre-wrap;
overflow-wrap:anywhere}
.pair{display:grid;grid-auto-columns:1fr;grid-auto-flow:column}
.pair>div{padding:12px 18px 14px;min-width:0}.pair>div+div{border-left:1px solid var(--line)}
.pair .head{display:flex;flex-wrap:wrap;gap:6px;align-items:center;font-size:.8rem;color:var(--dim);margin-bottom:5px}
.pair .head b{margin-right:auto}
.answer{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.94rem}
.answer:empty::before{content:"∅";color:var(--dim)}
details{margin:12px 0}summary{cursor:pointer;color:var(--c0);font-weight:600;font-size:.92rem;padding:4px 0}
details>pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem;max-height:420px;overflow:auto}
dl{margin:0;display:grid;grid-template-columns:minmax(170px,max-content) 1fr;gap:9px 22px;font-size:.9rem}
dt{font-weight:600}dd{margin:0}
footer{margin-top:44px;font-size:.82rem;color:var(--dim)}
@media(max-width:680px){main{padding:22px 14px 44px}h1{font-size:1.5rem}h2{margin-top:38px}
.tiles{grid-template-columns:1fr 1fr}.tile{padding:12px 13px}.tile .big{font-size:1.25rem}
.tile.hero{grid-template-columns:1fr}.tile.hero .big{font-size:2.5rem}
.stages{grid-template-columns:1fr 1fr;gap:8px}.stages li{padding:10px 12px 13px}
.pair{grid-auto-flow:row}.pair>div+div{border-left:0;border-top:1px dashed var(--line)}
dl{grid-template-columns:1fr;gap:2px}dd{margin-bottom:12px}
.verdicts thead{display:none}.verdicts tr{display:block;padding:10px 4px;border-bottom:1px solid var(--line)}
.verdicts tr:last-child{border-bottom:0}.verdicts td{display:inline-block;border:0;padding:1px 8px}
.verdicts td.reason{display:block}}
@media print{body{background:#fff}.card{break-inside:avoid}}
"""

CHINESE: Mapping[str, str] = {
    "Training report": "训练报告",
    "What was done": "做了什么",
    "The result": "结果",
    "Health": "健康状况",
    "Gates between the stages": "阶段之间的关卡",
    "what was looked at": "检查内容",
    "evidence": "证据",
    "Curves": "曲线",
    "Answers before and after": "训练前后的回答",
    "Answers while training": "训练中的回答",
    "What the numbers mean": "各项数字的含义",
    "Lineage: what went in, what came out, with which settings": "来历：输入、输出与设置",
    "Rankings by a SIMULATED annotator.": "排序由【模拟】标注员给出。",
    "No person was asked. This shows that the machinery learns what it is taught, not that the answers are good.": (
        "没有真人参与。这只说明机器学会了所教的偏好，不说明回答本身好。"
    ),
    "learns from demonstrations": "从示范中学习",
    "learns from rankings what is preferred": "从排序中学习偏好",
    "the policy learns what is preferred": "策略直接学习偏好",
    "the policy learns from the reward": "策略从奖励中学习",
    "writes answers": "生成回答",
    "puts answers in order": "给回答排序",
    "compares before and after": "比较训练前后",
    "done": "完成",
    "running": "进行中",
    "interrupted": "已中断",
    "Win rate": "胜率",
    "On {} of the prompts the trained model's answer is preferred to the one before; a tie counts half.": (
        "在 {} 的提示上，训练后的回答优于训练前；平局算一半。"
    ),
    "95 % interval": "95 % 区间",
    "clearly better than before": "明显优于训练前",
    "clearly worse than before": "明显差于训练前",
    "no clear difference": "没有明显差别",
    "no difference": "无差别",
    "Gold preference": "真实偏好得分",
    "Reward model": "奖励模型",
    "of held-out pairs ordered rightly": "留出答案对中排序正确的比例",
    "length alone": "只看长度",
    "Judged by the simulated annotator's hidden preference.": "评判者：模拟标注员的隐藏偏好。",
    "Judged by the reward model.": "评判者：奖励模型。",
    "Judged by a model that was asked about every pair in both orders.": (
        "评判者：一个模型，每对回答按两种顺序各问一次。"
    ),
    "In {} of the pairs the same place won both times; they count as ties.": (
        "{} 的回答对中，两次都是同一位置胜出；算作平局。"
    ),
    "Distance travelled": "偏离距离",
    "KL to the starting model, per answer": "与起始模型的 KL（每个回答）",
    "Length": "长度",
    "what the simulated annotator likes, before → after": "模拟标注员的喜好，训练前 → 训练后",
    "tokens an answer, before → after": "每个回答的词元数，训练前 → 训练后",
    "Finished": "自行结束",
    "answers that end by themselves": "自行结束的回答",
    "Variety": "多样性",
    "distinct pairs of words": "不重复的词对",
    "Time": "用时",
    "all stages together": "全部阶段合计",
    "Memory": "内存",
    "at its peak, in RAM": "峰值",
    "before": "训练前",
    "after": "训练后",
    "better": "更好",
    "worse": "更差",
    "gold": "真实偏好",
    "reward": "奖励",
    "step": "步",
    "more": "更多",
    "More curves": "更多曲线",
    "right axis": "右轴",
    "Healthy": "正常情形",
    "metric": "指标",
    "verdict": "判断",
    "value": "数值",
    "why": "原因",
    "what to turn": "可调的设置",
    "healthy": "正常",
    "look": "注意",
    "stop": "停止",
    "stage": "阶段",
    "seed": "种子",
    "inputs": "输入",
    "outputs": "输出",
    "settings": "设置",
    "cut at the length limit": "因长度上限截断",
    "Loss": "损失",
    "Pairs ordered rightly": "排序正确的答案对",
    "Margin between better and worse": "好坏回答的差距",
    "Log-probability of an answer": "回答的对数概率",
    "preferred": "更受偏好",
    "not preferred": "不受偏好",
    "preferred, held-out": "更受偏好（留出）",
    "not preferred, held-out": "不受偏好（留出）",
    "Score and gold preference": "奖励得分与真实偏好",
    "Score and gold by distance": "不同距离下的得分与真实偏好",
    "KL up to": "KL 不超过",
    "rounds": "轮数",
    "Where gold is highest the policy was at its best; what it gained beyond only looks better.": (
        "真实偏好最高处策略最好；此后得到的只是看起来更好。"
    ),
    "Distance from the starting model": "与起始模型的距离",
    "Entropy": "熵",
    "Length of an answer": "回答长度",
    "Finished and distinct answers": "自行结束与不重复的回答",
    "What the critic foresees": "价值模型的解释方差",
    "Size of the updates": "更新幅度",
    "Losses of policy and critic": "策略与价值损失",
    "Rehearsed demonstrations": "示范复习的损失",
    "Where the time goes": "时间分配",
    "coin toss": "随机猜测",
    "no better than a constant": "不如常数",
    "KL per answer": "每个回答的 KL",
    "mean": "平均",
    "finished": "自行结束",
    "distinct": "不重复",
    "per token": "每个词元",
    "explained variance": "解释方差",
    "approximate KL": "近似 KL",
    "clipped": "被截断",
    "policy": "策略",
    "critic": "价值模型",
    "loss": "损失",
    "answering": "生成回答",
    "scoring": "打分",
    "learning": "学习",
    "training": "训练",
    "held-out": "留出",
    "score": "得分",
    "score less KL": "得分减 KL",
    "gold preference": "真实偏好",
    "Healthy: both rise. When the score goes on rising and gold does not, the reward model is fooled.": (
        "正常情形：两者同升。若得分继续上升而真实偏好不升，说明奖励模型被钻了空子。"
    ),
    "Two scales: compare when the curves rise and fall, not how high they are.": (
        "左右刻度不同：请比较升降的时刻，不要比较高低。"
    ),
    "Written by dressage; opens without a network and runs no script.": "由 dressage 生成；无需联网，不含脚本。",
}
"""Headings and labels; what is not here stays English."""
