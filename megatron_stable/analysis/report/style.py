"""How the page looks: light, dark and in print. Figures take their colours from it."""

LIGHT = {
    "ink": "#222222", "muted": "#595959", "grid": "#dedede", "hole": "#e9e9e9", "paper": "#ffffff",
    "raised": "#f4f5f7", "link": "#00538a",
    "line-0": "#0072b2", "line-1": "#d55e00", "line-2": "#009e73", "line-3": "#c05a9a",
}  # fmt: skip
DARK = {
    "ink": "#e8e8e8", "muted": "#b4b4b4", "grid": "#3a3e45", "hole": "#4b5059", "paper": "#15171b",
    "raised": "#1f2228", "link": "#7cc4f2",
    "line-0": "#56b4e9", "line-1": "#f0803c", "line-2": "#2fc595", "line-3": "#e39ac8",
}  # fmt: skip


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colors.items())


CSS = (
    f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -100vw; }
.skip:focus { left: 1rem; top: 0.5rem; background: var(--paper); padding: 0.25rem 0.5rem; z-index: 2; }
.layout { display: grid; grid-template-columns: 13rem minmax(0, 1fr); max-width: 78rem; margin: auto; }
nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow-y: auto; padding: 1.5rem 1rem; }
nav ol { list-style: none; margin: 0; padding: 0; }
nav a { display: block; padding: 0.15rem 0; }
main, header { padding: 1rem 1.5rem; min-width: 0; }
header { max-width: 78rem; margin: auto; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; border-bottom: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 0; display: inline; }
figure { margin: 1rem 0 2rem; }
figcaption { color: var(--muted); font-size: 0.9rem; max-width: 60rem; }
.wide { overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 42rem; height: auto; }
figure svg text { font-family: system-ui, sans-serif; fill: var(--ink); }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid var(--grid);
  overflow-wrap: break-word; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 600; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; padding: 0.3rem 0.5rem; background: var(--raised); border-radius: 4px; }
fieldset { border: 1px solid var(--grid); margin: 0.5rem 0; display: flex; flex-wrap: wrap; gap: 0 1rem; }
code { font-size: 0.9em; }
.note { color: var(--muted); }
@media (max-width: 60rem) { .layout { display: block; } nav { position: static; max-height: none; } }
@media print {
  nav, .skip, fieldset { display: none; }
  .layout { display: block; max-width: none; }
  body { font-size: 9pt; }
  figure { break-inside: avoid; }
  figure svg { min-width: 0; }
  .wide { overflow: visible; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
}
"""
)
