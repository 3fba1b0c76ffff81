"""The numbers of a run's events by name, for programs that draw curves; each name says the unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def scalars_of(event: Mapping[str, Any]) -> dict[str, float]:
    """Name -> number; what is not known is left out, and an event without numbers has none.

    Samples, bytes and seconds are in the names; a loss is in the loss function's own unit.

    >>> scalars_of({"event": "validation", "step": 3, "loss": 0.5})
    {'validation/loss': 0.5}
    """
    match event["event"]:
        case "step":
            found = _of_step(event)
        case "validation":
            found = {"validation/loss": event["loss"]}
        case "average":
            found = {"validation/loss_of_average": event["loss"]}
        case _:
            found = {}
    return {name: float(value) for name, value in found.items() if value is not None}


def _of_step(event: Mapping[str, Any]) -> dict[str, float | None]:
    low, high = event["noise_scale_interval"]
    has_noise = event["noise_scale"] is not None
    found = {
        "train/loss": event["loss"],
        "train/learning_rate": event["learning_rate"],
        "train/gradient_norm": event["gradient_norm"],
        "train/samples_seen": event["samples_seen"],
        "train/global_batch_samples": event["global_batch"],
        "train/samples_per_s": event["samples_per_s"],
        "noise_scale/samples": event["noise_scale"],
        "noise_scale/low_samples": low if has_noise else None,
        "noise_scale/high_samples": high if has_noise else None,
    }
    for group, scale in enumerate(event["noise_scale_by_group"]):
        found[f"noise_scale/group_{group}_samples"] = scale
    for rank, peak_bytes in enumerate(event["measured_peak_bytes_by_rank"]):
        found[f"memory/rank_{rank}_measured_peak_bytes"] = peak_bytes
        found[f"memory/rank_{rank}_predicted_peak_bytes"] = event["predicted_peak_bytes"]
    return found
