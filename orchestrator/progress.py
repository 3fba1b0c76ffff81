"""What a person sees while a run goes on, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from cost_models.units import format_bytes
from orchestrator.metrics import Event

_LINE_EVERY_S = 10.0


class Display:
    """Shows a run's events.

    Args:
        total_steps: of the run, in batches of the job's own size; None where it is not known.
        base_batch: that size, in samples; None where it is not known.
        quiet: show nothing but warnings.
    """

    def __init__(self, total_steps: int | None, *, base_batch: int | None, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._total = total_steps
        self._base_batch = base_batch
        self._shown_s = 0.0
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total_steps, numbers="starting")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line of progress."""
        if not self._quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that is shown even when quiet."""
        self._console.print(f"warning: {text}", markup=False, soft_wrap=True)

    def pass_on(self, text: str) -> None:
        """One line that somebody else has written, shown even when quiet."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, event: Event) -> None:
        """Show one event of the run."""
        match event["event"]:
            case "step":
                self._show_step(event)
            case "validation":
                self.say(f"step {event['step']}: validation loss {event['loss']:.4f}")
            case "batch_size":
                sizes = f"batch {event['before']} to {event['batch']}, rate times {event['rate_factor']:.3g}"
                self.say(f"step {event['step']}: {sizes}: {event['reason']}")
            case "optimizer":
                rate = f"{event['learning_rate']:.3g}"
                self.say(f"step {event['step']}: {event['name']} goes on, at learning rate {rate}")
            case "average":
                self.say(f"averaged weights: validation loss {event['loss']:.4f}, in {event['path']}")
            case "warning":
                self.warn(event["message"])
            case "note":
                self.say(event["message"])
            case "started":
                if event["step"]:
                    self.say(f"continuing after step {event['step']}")
            case "resized":
                shared = f"batches of {event['global_batch']} in {event['accumulation']} micro-batches each"
                self.say(f"from {event['before']} to {event['workers']} workers: {shared}, planned anew")
            case "failure" if event["decision"] != "stop":  # which the command's last sentence says
                self.warn(event["message"])

    def _show_step(self, event: Event) -> None:
        batch = self._base_batch or event["global_batch"]
        numbers = describe_step(event)
        if event["global_batch"] != batch:
            numbers = f"batch {event['global_batch']}  {numbers}"
        place = event["samples_seen"] / batch
        self._bar.update(self._task, completed=math.floor(place), numbers=numbers)
        now_s = time.monotonic()
        is_last = self._total is not None and place >= self._total
        if self._bar.disable and (now_s - self._shown_s >= _LINE_EVERY_S or is_last):
            self._shown_s = now_s
            of_all = "" if self._total is None else f"/{self._total}"
            if of_all and place != event["step"]:
                of_all = f" ({place / self._total:.0%} of the run)"
            self.say(f"step {event['step']}{of_all}  {numbers}")


def describe_step(event: Event) -> str:
    """Loss, speed, measured beside predicted peak, and the noise scale with its interval."""
    loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
    parts = [f"loss {loss}", f"{event['samples_per_s']:.0f} samples/s"]
    if event["measured_peak_bytes"] is not None:
        peak = f"peak {format_bytes(event['measured_peak_bytes'])}"
        if event["predicted_peak_bytes"] is not None:
            peak += f" (predicted {format_bytes(event['predicted_peak_bytes'])})"
        parts.append(peak)
    if event["noise_scale"] is not None:
        parts.append(f"noise scale {describe_noise(event)}")
    return "  ".join(parts)


def describe_noise(event: Event) -> str:
    """The noise scale with its interval, and a question mark while it is not reliable."""
    low, high = event["noise_scale_interval"]
    text = f"{event['noise_scale']:.0f} [{low:.0f}, {'inf' if high is None else f'{high:.0f}'}]"
    return text if event["noise_scale_reliable"] else f"{text}?"


def write_line(text: str) -> None:
    """A result, on stdout, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
