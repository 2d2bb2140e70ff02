"""HTML pages of the package.

Owns: the Jinja environment of their templates. It does not know the contents of pages.
"""

import jinja2


def templates() -> jinja2.Environment:
    """The environment of the HTML templates. Values are escaped; undefined values raise an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("vla"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
