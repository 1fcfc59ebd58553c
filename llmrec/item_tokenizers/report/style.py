"""The shell of the page about codes and its style, light and dark. Text only; nothing is loaded by it."""

_LIGHT = "--bg:#f6f7f9;--panel:#fff;--text:#1c2430;--muted:#5d6878;--line:#dfe3e9;"
_LIGHT += "--good:#1a7f45;--look:#9a6200;--bad:#c0312b;"
_LIGHT += "--s0:#2f6fde;--s1:#e07b18;--s2:#1f9d6b;--s3:#c93c8a;--s4:#7a55d6;--s5:#0e9fb5;--s6:#b8860b;--s7:#d6453d;"
_LIGHT += "--grey:#b4bcc8;--pale-s:45%;--pale-l:68%"
_DARK = "--bg:#12161c;--panel:#1b2129;--text:#e6eaf0;--muted:#9aa6b5;--line:#303946;"
_DARK += "--good:#4cc38a;--look:#e6b04d;--bad:#ff7a70;"
_DARK += "--s0:#6ea3ff;--s1:#ffa24d;--s2:#4fd1a0;--s3:#f27ab8;--s4:#ab8dff;--s5:#45d0e6;--s6:#e3c04f;--s7:#ff8078;"
_DARK += "--grey:#566274;--pale-s:26%;--pale-l:46%"
STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1160px;margin:0 auto;padding:28px 20px 40px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px}h2{font-size:19px;margin:36px 0 4px}
h3{font-size:14px;margin:0 0 4px;font-weight:600}
header p,section>p{margin:0 0 14px;color:var(--muted);max-width:78ch}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(255px,1fr));gap:14px;margin-top:18px}
.card,.panel{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card{border-top:4px solid var(--state)}.card p{margin:6px 0 0;font-size:13px;color:var(--muted)}
.card p.figure{font-size:28px;line-height:1.15;font-weight:650;color:var(--text);margin:0;display:inline-block}
.card p.pill{display:inline-block;margin:0 0 0 10px;padding:1px 9px;border:1px solid var(--state);border-radius:99px;
color:var(--state);font-weight:600;vertical-align:5px;white-space:nowrap}
.card p.remedy{color:var(--text);border-left:3px solid var(--state);padding-left:9px}
.good{--state:var(--good)}.look{--state:var(--look)}.bad{--state:var(--bad)}
.charts{display:flex;flex-wrap:wrap;gap:14px}.charts .panel{flex:1 1 255px;max-width:400px;padding:14px 12px}
svg{display:block;width:100%;height:auto}
svg text{font-size:12px;fill:var(--muted)}svg text.value{fill:var(--text)}
.grid{stroke:var(--line);stroke-width:1}
.dead{fill:var(--bad);opacity:.13}
.facts{margin:6px 0 0;font-size:12.5px;color:var(--muted)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:0 0 6px;font-size:12.5px;color:var(--muted)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.fm{fill:var(--grey)}.bm{background:var(--grey)}
.map circle{opacity:.85}.map .pale{fill:hsl(var(--h) var(--pale-s) var(--pale-l))}.map .pale circle{opacity:.6}
.map:hover g:not(:hover){opacity:.18}.map g:hover circle{opacity:1;stroke:var(--text);stroke-width:1}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--muted);font-weight:600}th:first-child,td:first-child{text-align:left}
tbody tr:last-child td{border-bottom:0}
footer{margin-top:32px;font-size:12.5px;color:var(--muted)}
@media(max-width:640px){.charts .panel{max-width:none}}
@media(max-width:480px){main{padding:18px 12px 30px}h1{font-size:21px}}
""" + "".join(f".f{n}{{fill:var(--s{n})}}.b{n}{{background:var(--s{n})}}.l{n}{{stroke:var(--s{n})}}" for n in range(8))
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
<footer>Made by llmrec {version}. The verdicts point to where to look; how good codes are is told by the recommender
that is trained on them.</footer>
</main></body></html>
"""
