"""The pages that people look at: how a template of this package is loaded.

Owns: the template environment. It does not know what any page shows.
"""

import jinja2


def templates() -> jinja2.Environment:
    """The package's HTML templates: values are escaped, and a missing one is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("vla"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
