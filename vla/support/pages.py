"""HTML pages of the package.

Owns: the Jinja environment that loads their templates. It does not know the content of any page.
"""

import jinja2


def templates() -> jinja2.Environment:
    """The environment of the HTML templates. Values are escaped, and an undefined value is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("vla"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
