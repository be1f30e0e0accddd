"""Translates docstrings in diffusers' form for the site: names in brackets become links, types lose their markup."""

import re

import griffe


NAME = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
# "height, width (`int`, *optional*, defaults to 8):" at the start of a line, with the list's own indentation
ARGUMENT = re.compile(r"^( +(?:\w+, )*\w+ \()(.+)(\):)", re.MULTILINE)
DEFAULT = re.compile(r", defaults to .*")


class LinkNames(griffe.Extension):
    """Runs once the whole package is read, so that a name can be followed to where it is defined."""

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        self._translate(pkg, pkg)

    def _translate(self, obj: griffe.Object, pkg: griffe.Module) -> None:
        if obj.docstring:
            text = ARGUMENT.sub(lambda match: match[1] + self._plain_type(match[2]) + match[3], obj.docstring.value)
            obj.docstring.value = NAME.sub(lambda match: self._link(obj, pkg, match[1]), text)
        for member in obj.members.values():
            if not member.is_alias:
                self._translate(member, pkg)

    @staticmethod
    def _plain_type(text: str) -> str:
        # The default is in the signature, from where it is shown already.
        return DEFAULT.sub("", NAME.sub(r"\1", text)).replace("`", "").replace("*", "")

    @staticmethod
    def _link(obj: griffe.Object, pkg: griffe.Module, name: str) -> str:
        for find in (obj.resolve, lambda name: pkg[name].canonical_path):
            try:
                return f"[`{name}`][{pkg.modules_collection[find(name)].canonical_path}]"
            except (KeyError, griffe.GriffeError):
                continue
        return f"`{name}`"
