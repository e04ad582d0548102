"""Callbacks that write the reports of the monitor to TensorBoard and wandb."""

from __future__ import annotations

from importlib import import_module

from ..core.arguments import kind
from .report import StabilityReport


class TensorBoardWriter:
    """Writes the values and warnings of each report with torch's `SummaryWriter`.

    Args:
        writer: a `SummaryWriter`, or the folder of a new one (None: its default).

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, writer=None) -> None:
        if not hasattr(writer, "add_scalar"):
            try:
                module = import_module("torch.utils.tensorboard")
            except ImportError as missing:
                raise ImportError(
                    "TensorBoardWriter needs TensorBoard (pip install tensorboard)"
                ) from missing
            writer = module.SummaryWriter(writer)
        self.writer = writer

    def __call__(self, report: StabilityReport) -> None:
        """Writes one report."""
        for name, value in report.values.items():
            self.writer.add_scalar(name, value, report.step)
        if report.warnings:
            text = "\n\n".join(w.message for w in report.warnings)
            self.writer.add_text("warnings", text, report.step)


class WandbWriter:
    """Logs the values of each report, and the number of its warnings, to a wandb run.

    wandb's steps only grow and a report may come late, so the step of a report is logged as the
    value `stability/step`, against which wandb draws the others.

    Args:
        run: what `wandb.init` returned; None takes the run that is active, or starts one.

    Raises:
        TypeError: run is neither a wandb run nor None.
        ImportError: wandb is not installed.
    """

    def __init__(self, run=None) -> None:
        if run is None:
            try:
                wandb = import_module("wandb")
            except ImportError as missing:
                raise ImportError("WandbWriter needs wandb (pip install wandb)") from missing
            run = wandb.run if wandb.run is not None else wandb.init()
        if not hasattr(run, "define_metric"):
            raise TypeError(f"run must be a wandb run or None, got {kind(run)}")
        self.run = run
        run.define_metric("stability/step")
        run.define_metric("stability/*", step_metric="stability/step")

    def __call__(self, report: StabilityReport) -> None:
        """Logs one report."""
        values = {f"stability/{name}": value for name, value in report.values.items()}
        counts = {"stability/step": report.step, "stability/warnings": len(report.warnings)}
        self.run.log(values | counts)
