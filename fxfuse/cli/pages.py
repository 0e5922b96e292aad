"""A report on a screen: rich tables in a terminal, the report's own text elsewhere."""

from __future__ import annotations

from fxfuse.report import Report

from .screen import Screen


def show_report(screen: Screen, report: Report) -> None:
    """The whole report; in a terminal its ops and refusals as tables."""
    if not screen.terminal:
        screen.text(str(report))
        return
    screen.text(str(report).split("\n\n")[0])
    for plan in report.fused:
        rows = [[op.op, f"{op.lanes:,}" if op.lanes else "", op.detail, op.lowering, str(op.place or "")] for op in plan.ops]
        screen.table(["op", "lanes", "shapes", "computed by", "line"], rows, title=f"fused: {plan.path or 'the model itself'}")
    if report.refused:
        reasons = [[str(refusal), refusal.region] for refusal in report.refused]
        screen.table(["left as it is", "in"], list(map(list, dict.fromkeys(map(tuple, reasons)))))
    if report.validation is not None:
        screen.text("\n".join(report.validation.summary()))
    for note in dict.fromkeys([*report.facts, *report.notes]):
        screen.text(f"note: {note}")
