"""What a person sees while a run goes on, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

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
        total_steps: of the run.
        quiet: show nothing but warnings.
    """

    def __init__(self, total_steps: int, *, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._total = total_steps
        self._shown_s = 0.0
        self._started = False
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

    def show(self, event: Event) -> None:
        """Show one event of the run."""
        match event["event"]:
            case "step":
                self._show_step(event)
            case "validation":
                self.say(f"step {event['step']}: validation loss {event['loss']:.4f}")
            case "optimizer":
                rate = f"{event['learning_rate']:.3g}"
                self.say(f"step {event['step']}: {event['name']} goes on, at learning rate {rate}")
            case "average":
                self.say(f"averaged weights: validation loss {event['loss']:.4f}, in {event['path']}")
            case "warning":
                self.warn(event["message"])
            case "started":
                if self._started:
                    self.warn(f"a rank was lost; the run continues from step {event['step']}")
                elif event["step"]:
                    self.say(f"continuing after step {event['step']}")
                self._started = True

    def _show_step(self, event: Event) -> None:
        numbers = describe_step(event)
        self._bar.update(self._task, completed=event["step"], numbers=numbers)
        now_s = time.monotonic()
        if self._bar.disable and (now_s - self._shown_s >= _LINE_EVERY_S or event["step"] == self._total):
            self._shown_s = now_s
            self.say(f"step {event['step']}/{self._total}  {numbers}")


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
