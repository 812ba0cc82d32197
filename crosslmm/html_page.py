"""Self-contained HTML pages of this package: one style, no script or image from elsewhere, all text escaped."""

import html

from crosslmm.text import printable, redacted


def escaped(value: object) -> str:
    """Return a value as text of a page: no markup, no control characters, no credentials."""
    return html.escape(printable(redacted(str(value))))


def document(title: str, body: str, style: str = "", script: str = "", library: str = "") -> str:
    """Return a page.

    Args:
        title: of the window; escaped here.
        body: HTML of the main part.
        style: CSS besides `STYLE`.
        script: JavaScript that runs when the page is there.
        library: JavaScript that runs before.
    """
    # Plotly can load two things from the network. The page needs neither, and its policy forbids it.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{escaped(title)}</title>
<style>{STYLE}{style}</style>
<script>{library}</script>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


STYLE = """
*{box-sizing:border-box}
body{margin:0;background:#fff;color:#222;font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 8px}
h2{font-size:1.15rem;margin:40px 0 4px}
p{margin:0 0 12px;color:#444;overflow-wrap:anywhere}
code{background:#f5f5f5;padding:2px 6px;border-radius:3px;font-size:.875rem}
ul{margin:0;padding-left:20px;overflow-wrap:anywhere}
.answer{font-size:1.2rem;color:#111;border-left:4px solid #0072B2;padding:2px 0 2px 14px;margin:12px 0 20px}
.absent{background:#f5f5f5;padding:10px 14px;border-radius:4px}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:10px 24px;margin:0}
.wide{grid-column:1/-1}
dt{font-size:.8rem;color:#595959}
dd{margin:0;color:#444;overflow-wrap:anywhere}
.box{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid #e3e3e3;vertical-align:top}
th{font-weight:600;border-bottom:2px solid #999;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:2px}
@media(max-width:600px){main{padding:16px 12px 48px}h1{font-size:1.35rem}.answer{font-size:1.05rem}}
"""
