"""Show examples of docstrings as code on the site: a paragraph that begins with `>>>` becomes a section "Examples"."""

import re

import griffe

DOCTEST = re.compile(r"(?:^|\n\n)(>>> .*?)(?=\n\n|\Z)", re.DOTALL)


class DoctestSections(griffe.Extension):
    """Move doctests, which stand in docstrings without a heading, into the section that the site renders as code."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        docstring = obj.docstring
        if docstring is None or ">>> " not in docstring.value or "Examples:\n" in docstring.value:
            return
        found = DOCTEST.findall(docstring.value)
        indented = ("\n".join(f"    {line}" for line in block.splitlines()) for block in found)
        docstring.value = DOCTEST.sub("", docstring.value).rstrip() + "\n\nExamples:\n" + "\n\n".join(indented) + "\n"
