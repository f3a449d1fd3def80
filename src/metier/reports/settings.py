"""How to make the run again: its command, configuration, evaluation settings and versions."""

from __future__ import annotations

from collections.abc import Mapping

from metier.reports.blocks import missing, section, table
from metier.reports.data import ReportData
from metier.reports.markup import Child, Markup, tag


def settings(data: ReportData) -> Markup:
    """Everything that was set, and with what it ran."""
    title = "How to make it again"
    evaluated = next((one.settings for one in data.evaluations.values()), {})
    groups = [
        ("Configuration", data.config),
        ("Evaluation", evaluated),
        ("Versions", data.versions),
    ]
    given = [tag("div", tag("h3", name), _pairs(values)) for name, values in groups if values]
    command = None if data.command is None else tag("pre", data.command, class_="command", tabindex="0")
    if not given and command is None:
        return section(title, missing("No configuration was given."))
    return section(title, command, tag("div", *given, class_="settings"))


def _pairs(values: Mapping[str, object]) -> Markup:
    body: list[list[Child]] = [[name, "not set" if value is None else str(value)] for name, value in values.items()]
    return table(["name", "value"], body)
