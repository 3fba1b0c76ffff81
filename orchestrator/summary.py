"""What came of a run, in words: the last lines on stdout."""

from __future__ import annotations

from typing import Any

from cost_models.units import format_bytes


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The lines for the last event of a run.

    Args:
        summary: the event "end".
    """
    lines = []
    before, after = summary["validation_before"], summary["validation_after"]
    if before is not None and after is not None:
        lines.append(
            f"validation loss       {before:.4f} before, {after:.4f} after step {summary['validated_step']}"
        )
    peaks = summary["measured_peak_bytes_by_rank"]
    if len(peaks) > 1:
        each = ", ".join(f"{format_bytes(peak)} on rank {rank}" for rank, peak in enumerate(peaks))
        promised = summary["predicted_peak_bytes"]
        lines.append(
            f"measured peak         {each}"
            + ("" if promised is None else f"; predicted {format_bytes(promised)}")
        )
    lines.append(f"recommended batch     {_recommendation(summary)}")
    lines.append(f"run folder            {summary['run_dir']}")
    return lines


def _recommendation(summary: dict[str, Any]) -> str:
    if summary["recommended_batch"] is None:
        return f"none: {summary['recommended_because']}"
    batches = f"{summary['recommended_batch']} samples a step, now {summary['global_batch']}"
    return f"{batches}: {summary['recommended_because']}"
