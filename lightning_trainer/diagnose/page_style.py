"""The style sheet of the page."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2430; --soft: #5b6675; --line: #dde2e9; --code: #fafbfc;
  --trained: #c9f0d6; --trained-ink: #0b4a26; --stop: #16794a; --stop-ink: #ffffff;
  --special: #6a58b8; --escape: #9a5b00; --escape-back: #fff1d6;
  --loud: #a3122a; --loud-back: #fde8ea; --seen: #c9d2de; --learnt: #35a76b; --hatch: #e6eaf0; --accent: #2f5fd0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151b; --card: #1a2029; --ink: #e4e9f0; --soft: #97a3b3; --line: #2d3643; --code: #151a22;
    --trained: #143d29; --trained-ink: #b4f0cb; --stop: #4fd08c; --stop-ink: #06240f;
    --special: #b3a4f5; --escape: #f0b75e; --escape-back: #3a2b10;
    --loud: #ff9aa7; --loud-back: #41161d; --seen: #465263; --learnt: #37b074; --hatch: #232b36; --accent: #8fb0ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 10px; }
h3 { font-size: 15px; margin: 0; overflow-wrap: anywhere; }
p { margin: 0 0 10px; max-width: 82ch; }
.soft { color: var(--soft); }
.lead { color: var(--soft); margin-bottom: 18px; }
.loud {
  background: var(--loud-back); color: var(--loud); border-left: 4px solid currentColor; border-radius: 6px;
  padding: 10px 14px; margin: 0 0 10px; font-weight: 600; overflow-wrap: anywhere;
}
.note { border-left: 3px solid var(--line); padding-left: 12px; color: var(--soft); overflow-wrap: anywhere; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 16px; overflow: hidden;
}
.card > header {
  display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: baseline; justify-content: space-between;
  padding: 11px 16px; border-bottom: 1px solid var(--line);
}
.card > .inside { padding: 14px 16px; }
.figures { color: var(--soft); font-size: 13.5px; font-variant-numeric: tabular-nums; }
.figures b { color: var(--ink); font-weight: 600; }
dl.facts {
  display: flex; flex-wrap: wrap; gap: 1px; margin: 0; background: var(--line); border: 1px solid var(--line);
  border-radius: 10px; overflow: hidden;
}
dl.facts div { flex: 1 1 auto; min-width: 104px; max-width: 100%; background: var(--card); padding: 9px 14px; }
dl.facts dt { color: var(--soft); font-size: 12.5px; }
dl.facts dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.legend {
  position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: baseline;
  background: var(--page); border-bottom: 1px solid var(--line); padding: 9px 0; margin: 24px 0 14px; font-size: 13.5px;
}
.tokens, .legend code, td.place, .mono {
  font-family: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
.tokens {
  margin: 0; padding: 14px 16px; background: var(--code); font-size: 13.5px; line-height: 1.75;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
}
.t { background: var(--trained); color: var(--trained-ink); padding: 1px 0; }
.s { color: var(--special); }
.t.s { color: var(--trained-ink); }
.x { background: var(--stop); color: var(--stop-ink); font-weight: 600; border-radius: 3px; padding: 1px 3px; }
.e { background: var(--escape-back); color: var(--escape); border-radius: 3px; }
.n { opacity: 0.45; user-select: none; }
.tokens span[title]:hover { outline: 1.5px solid var(--accent); outline-offset: 0; border-radius: 2px; cursor: help; }
.bar {
  display: flex; height: 34px; border-radius: 6px; overflow: hidden; background: var(--hatch); margin: 4px 0 6px;
  border: 1px solid var(--line);
}
.bar .part {
  min-width: 4px; border-right: 2px solid var(--card); display: flex; align-items: center; justify-content: center;
  font-size: 12.5px; font-weight: 600; overflow: hidden; color: var(--ink); white-space: nowrap;
}
.bar .part.closes { border-right-width: 6px; }
.bar .part:last-child { border-right: 0; }
.bar .part b {
  background: var(--card); border-radius: 9px; padding: 0 7px; line-height: 18px; font-weight: 600; opacity: 0.94;
}
.bar.thin { height: 10px; }
.bar .free {
  background: repeating-linear-gradient(135deg, transparent 0 5px, var(--line) 5px 7px);
}
.scale { display: flex; justify-content: space-between; color: var(--soft); font-size: 12px; margin-bottom: 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12.5px; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th.number, td.number { text-align: right; white-space: nowrap; }
td.place { overflow-wrap: anywhere; min-width: min(280px, 42vw); }
td.place.short { white-space: nowrap; min-width: 0; }
.pack { margin: 0 0 14px; }
.ok { color: var(--stop); }
.swatch {
  display: inline-block; width: 22px; height: 11px; border-radius: 3px; vertical-align: -1px; margin-right: 5px;
}
.swatch.learnt { background: var(--learnt); }
.swatch.seen { background: var(--seen); }
.swatch.free { background: repeating-linear-gradient(135deg, var(--hatch) 0 4px, var(--soft) 4px 5px); }
@media (max-width: 640px) {
  main { padding: 20px 14px 48px; }
  .legend { position: static; }
  .tokens { padding: 12px; font-size: 12.5px; }
  .card > header, .card > .inside { padding-left: 12px; padding-right: 12px; }
}
@media print { .legend { position: static; } .card { break-inside: avoid; } }
"""
