"""What every page is made with: one file of HTML with its style and its scripts in it, and a policy that allows these alone.

Texts of a dataset are cleaned with [`clean`], escaped by Jinja where a template shows them, and set with `textContent` where a
script does. `assets` has the style and the script that all pages begin with, and the library that draws charts.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..files import replacing


PLOT = ("vendor/d3.min.js", "vendor/plot.umd.min.js")
"""Observable Plot and what it needs, for [`template`]."""

PLOT_STYLE = """\
:where(.plot) {
  --plot-background: white;
  display: block;
  height: auto;
  height: intrinsic;
  max-width: 100%;
}
:where(.plot text),
:where(.plot tspan) {
  white-space: pre;
}"""
"""The style element that Observable Plot puts into each chart of class `plot`, word for word: the page's policy allows it."""

# Surrogates cannot be written as UTF-8, and the other control characters have no place in a page.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def template(
    package: str,
    scripts: Sequence[str],
    *,
    shared: Sequence[str] = (),
    filters: Mapping[str, Callable[..., Any]] | None = None,
    connect: str = "",
) -> jinja2.Template:
    """The template `page.html.jinja` of a package's `assets`, with `page.css` and the scripts in it.

    Args:
        package: Its name.
        scripts: Its scripts, in their order; `base.js` of this package runs before them.
        shared: Others of this package's assets that run before all: [`PLOT`].
        filters: More Jinja filters.
        connect: What scripts may fetch from (a source of the policy's `connect-src`): nothing by default.

    Returns:
        A template whose globals are `style`, `scripts` and `policy`, the Content-Security-Policy that allows only these.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: asset(package, name)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(filters or {})
    style = asset(__name__, "base.css") + asset(package, "page.css")
    run = [asset(__name__, name) for name in (*shared, "base.js")] + [asset(package, name) for name in scripts]
    styles = [style, *([PLOT_STYLE] if set(PLOT) <= set(shared) else [])]
    environment.globals |= {
        "style": Markup(style),
        "scripts": [Markup(script) for script in run],
        "policy": "; ".join(
            [
                "default-src 'none'",
                f"script-src {' '.join(map(_hash, run))}",
                f"style-src {' '.join(map(_hash, styles))}",
                "img-src data:",
                *([f"connect-src {connect}"] if connect else []),
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
    }
    return environment.get_template("page.html.jinja")


@functools.cache
def asset(package: str, name: str) -> str:
    """A file of a package's `assets`."""
    return (resources.files(package) / "assets" / name).read_text(encoding="utf-8")


def json_for_script(value: Any) -> Markup:
    """JSON that nothing inside can end the script element of, or be taken for markup."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def clean(value: Any, limit: int | None = None) -> str:
    """A text of the data, fit to be written: `""` for `None`, U+FFFD for what cannot be shown, cut where it is too long."""
    text = "" if value is None else value if isinstance(value, str) else str(value)
    left = 0 if limit is None else len(text) - limit
    text = _UNPRINTABLE.sub("\ufffd", text if left <= 0 else text[:limit])
    return text if left <= 0 else f"{text} … ({left:,} more characters, not in this page)"


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader finds the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
    return f"'sha256-{digest}'"
