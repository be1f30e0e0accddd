"""Turns the names that docstrings write as diffusers does, in brackets and backticks, into links of the site."""

import re

import griffe


NAME = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")


class LinkNames(griffe.Extension):
    """Runs once the whole package is read, so that a name can be followed to where it is defined."""

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        self._link(pkg, pkg, set())

    def _link(self, obj: griffe.Object, pkg: griffe.Module, seen: set[str]) -> None:
        if obj.path in seen:
            return
        seen.add(obj.path)
        if obj.docstring:
            obj.docstring.value = NAME.sub(lambda match: self._target(obj, pkg, match[1]), obj.docstring.value)
        for member in obj.members.values():
            if not member.is_alias:
                self._link(member, pkg, seen)

    @staticmethod
    def _target(obj: griffe.Object, pkg: griffe.Module, name: str) -> str:
        for scope in (obj.resolve, lambda name: pkg[name].canonical_path):
            try:
                path = scope(name)
                return f"[`{name}`][{pkg.modules_collection[path].canonical_path}]"
            except (KeyError, griffe.GriffeError):
                continue
        return f"`{name}`"
