"""`metier methods`: the survey's tree on a terminal, and one method in full."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from metier.catalogue.method import Method
from metier.catalogue.options import option_types
from metier.catalogue.tree import METHODS, tree


def methods_tree() -> RenderableType:
    """Every method in its place, a line each: name, title, provider, whether it merges, what it fits."""
    root = Tree(
        Text(f"{len(METHODS)} methods; `metier methods NAME` says more of one, `metier train --method NAME` runs it")
    )
    for kind, groups in tree().items():
        branch = root.add(Text(kind, style="bold"))
        for group, methods in groups.items():
            leaf = branch.add(Text(group, style="italic"))
            width = max(len(method.name) for method in methods)
            for method in methods:
                leaf.add(Text(_line(method, width)))
    return root


def _line(method: Method, width: int) -> str:
    merges = "merges" if method.merges else "stays beside"
    return f"{method.name:<{width}}  {method.title} ({method.provider}, {merges}, {' and '.join(method.fits)})"


def one_method(method: Method) -> RenderableType:
    """All that is known of one method, with its options and their types."""
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("name", method.name),
        ("place", " › ".join(method.branch)),
        ("paper", method.paper),
        ("provider", method.provider),
        ("trains", method.trains),
        ("at inference", method.inference),
        ("merges", "yes" if method.merges else "no"),
        ("fits", " and ".join(method.fits)),
        ("goes on", _places(method)),
    ):
        table.add_row(Text(name, style="bold"), Text(value))
    options = Table(title="Options", title_justify="left", show_header=False, box=None)
    defaults = {**method.procedure_options, **method.defaults}
    for name, hint in sorted(option_types(method.name).items()):
        shown = getattr(hint, "__name__", None) if isinstance(hint, type) else None
        default = f"{defaults[name]!r} here" if name in defaults else ""
        options.add_row(Text(name), Text(shown or str(hint).replace("typing.", "")), Text(default))
    parts: list[RenderableType] = [Text(method.title, style="bold"), table]
    return Group(*parts, *([options] if options.row_count else []))


def _places(method: Method) -> str:
    if method.is_prompt:
        return "the beginning of every record"
    if not method.targets:
        return "a place of its own"
    usual = ", ".join(method.targets)
    on_moe = "" if method.moe_targets is None else f"; on MoE models {', '.join(method.moe_targets)}"
    return f"{usual}{on_moe}; `targets` may name {', '.join(method.can_target)}"
