"""How the merge report looks: light and dark, on screens from a phone's up, and on paper."""

from __future__ import annotations

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # what the page may load: nothing

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --wash: #f5f7fa; --ink: #17212b; --soft: #55646f; --line: #d9e0e7;
  --accent: #1d5fa8; --bar: #5b93c9; --cool: 43 108 176; --warm: 201 106 20; --most: .5; --good: #17663f;
  --goodwash: #e9f6ef; --warn: #8a4b00; --warnwash: #fff3dd; --bad: #a3231b; --badwash: #fdebe9; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #12171c; --wash: #1b2229; --ink: #e6ecf1;
  --soft: #a3b1bd; --line: #313c46; --accent: #7db4ec; --bar: #4b80b5; --cool: 52 120 196; --warm: 176 88 16;
  --most: .7; --good: #7fd8ac; --goodwash: #14291f; --warn: #ffc676; --warnwash: #30240f; --bad: #ff9d93;
  --badwash: #371a17; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; }
h1 { font-size: 1.9rem; margin: 0 0 .4rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
section { border-top: 1px solid var(--line); margin-top: 2.2rem; padding-top: 1.6rem; }
p, ul { margin: .5rem 0; max-width: 46rem; } ul { padding-left: 1.2rem; } li { margin: .25rem 0; }
code { font: .85em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.kicker { margin: 0 0 .3rem; color: var(--accent); font-weight: 600; font-size: .8rem; letter-spacing: .08em;
  text-transform: uppercase; }
.soft, .absent, caption { color: var(--soft); } .absent { font-style: italic; }

.box { margin: 1.4rem 0; padding: .9rem 1.2rem; border-left: .35rem solid var(--edge); border-radius: .4rem;
  background: var(--fill); overflow-wrap: anywhere; }
.box strong { color: var(--edge); font-size: 1.15rem; } .box p { margin: .25rem 0 0; }
.good { --edge: var(--good); --fill: var(--goodwash); } .warn { --edge: var(--warn); --fill: var(--warnwash); }
.bad { --edge: var(--bad); --fill: var(--badwash); }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.2rem 0 0; }
.tiles div { background: var(--wash); border-radius: .4rem; padding: .8rem 1rem; min-width: 0; }
.tiles dt { font-size: .85rem; color: var(--soft); }
.tiles dd { margin: 0; font-size: .85rem; overflow-wrap: anywhere; }
.tiles .figure { font-size: 1.45rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }

.wide { overflow-x: auto; margin: .8rem 0; }
.wide:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; font-size: .85rem; padding: 0 0 .3rem; }
th, td { padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: middle; }
th { font-weight: 600; } tbody th { font-weight: 400; min-width: 9rem; max-width: 18rem; overflow-wrap: anywhere; }
thead th { vertical-align: bottom; color: var(--soft); font-size: .85rem; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.n { max-width: 9rem; white-space: normal; }
th.group { padding-top: 1rem; color: var(--soft); font-size: .85rem; max-width: none; }
tr.chosen { background: var(--goodwash); } tr.chosen th, tr.chosen td { font-weight: 650; }
.pill { display: inline-block; padding: 0 .5rem; border-radius: 1rem; background: var(--good); color: var(--paper);
  font-size: .75rem; font-weight: 650; }
td.heat { --hue: var(--cool); background: rgb(var(--hue) / calc(var(--strength) * var(--most)));
  border: 1px solid var(--paper); padding: .38rem .45rem; min-width: 3.1rem; text-align: center;
  font-variant-numeric: tabular-nums; }
td.against { --hue: var(--warm); }
.dense { font-size: .7rem; } .dense td.heat { min-width: 0; padding: .3rem .1rem; } .dense th { font-size: .75rem; }
th.tall { padding: .3rem .2rem; text-align: left; } th.tall span { display: inline-block; writing-mode: vertical-rl;
  transform: rotate(180deg); max-height: 11rem; overflow: hidden; overflow-wrap: anywhere; line-height: 1.15; }

.facts div { display: grid; grid-template-columns: 12rem 1fr; gap: 0 1rem; padding: .35rem 0; font-size: .9rem;
  border-bottom: 1px solid var(--line); } .facts { margin: .8rem 0; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: center; } .pair > * { max-width: 100%; }

svg { display: block; } .plot { max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
.bar { fill: var(--bar); } .dot { fill: var(--accent); } .chosen .dot { fill: var(--good); }
.grid, .track { stroke: var(--line); } .range { stroke: var(--bar); stroke-width: 4; stroke-linecap: round; }
.beside { stroke: var(--warn); stroke-width: 1.5; stroke-dasharray: 3 2; }
.ideal { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 4; }

@media (max-width: 40rem) { main { padding-top: 1.5rem; } h1 { font-size: 1.5rem; }
  .facts div { grid-template-columns: 1fr; } .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media print { * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } @page { margin: 15mm; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; } .wide { overflow: visible; }
  table { font-size: 8pt; } .dense, .dense th { font-size: 5.5pt; } td.heat { min-width: 0; }
  .dense tbody th { min-width: 5rem; }
  h2, h3 { break-after: avoid; } tr, .box, .tiles, .plot, .facts div { break-inside: avoid; } }
"""
