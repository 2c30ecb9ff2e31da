"""Docstrings as the API reference shows them: this project's plain layout becomes Markdown."""

import re

import griffe

ROW = re.compile(r"^(\S+(?: \S+)*) {2,}(\S.*)$")  # name  what it is


class PlainLayout(griffe.Extension):
    """Changes the docstrings of a package after it was read."""

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        if pkg.name == "serving":  # of the answers, only those that the client gives
            replies = pkg["protocol.replies"].members
            for name in {*replies} - {*map(str, pkg["client"].exports)}:
                del replies[name]
        change(pkg)


def change(parent: griffe.Module | griffe.Class) -> None:
    for member in parent.members.values():
        if not member.is_alias and not member.is_attribute:
            if member.is_class:
                fields_into_docstring(member)
            elif member.docstring:
                member.docstring.value = to_markdown(member.docstring.value)
            change(member)


def fields_into_docstring(of: griffe.Class) -> None:
    """The fields of a class, with their docstrings, become rows of its own; they are not shown one by one then."""
    parts = [to_markdown(of.docstring.value)] if of.docstring else []
    for base in map(str, of.bases):
        if base in of.parent.classes:
            parts.append(f"Has the fields of `{base}`, and these:")
    for field in [member for member in of.members.values() if member.is_attribute and "property" not in member.labels]:
        if field.annotation and not field.name.startswith("_"):
            default = "" if field.value is None else f" = {field.value}"
            comment = field.source.partition("  # ")[2]
            meaning = escaped(" ".join((field.docstring.value if field.docstring else comment).split())) or "&nbsp;"
            parts.append(f"`{field.name}: {field.annotation}{default}`\n:   {meaning}")
            del of.members[field.name]
    of.decorators, of.labels = [], set()  # no empty list of arguments, and no word "dataclass"
    of.docstring = griffe.Docstring("\n\n".join(parts), parent=of) if parts else None


def to_markdown(docstring: str) -> str:
    """Rows of `name  what it is`, with their continuation lines, become a definition list.

    Indented blocks stay as they are: Markdown shows them as code.
    """
    lines, in_rows = [], False
    for line in docstring.replace(".. math:: ", "    ").splitlines():
        if row := ROW.match(line):
            lines += ["", f"`{row[1]}`", f":   {escaped(row[2])}"]
            in_rows = True
        elif in_rows and line.startswith("  "):
            lines.append(f"    {escaped(line.strip())}")
        else:
            if in_rows and line:
                lines.append("")
            in_rows = False
            lines.append(line if line.startswith("    ") else escaped(line))
    return "\n".join(lines)


def escaped(line: str) -> str:
    """Without what Markdown would take for emphasis or HTML, outside of `code`."""
    parts = line.split("`")
    parts[::2] = [re.sub(r"([*<>]|\b_|_\b)", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
