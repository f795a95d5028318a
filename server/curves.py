"""TensorBoard curves of a run, written as it goes; needs neither torch nor TensorFlow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class Curves:
    """Writes `OUT/events` from the lines of `rounds.jsonl`; give `line` to `Federation(on_line=)`.

    Tags: `epsilon/<population>/<site>`, `round/seconds`, `round/sites`, `bytes/up`, `bytes/down`,
    and per evaluation `<metric>/<task>` and `<metric>/macro`. The step is the round. A value that
    is not there (withheld, or ε in mode `none`) leaves a gap.
    """

    def __init__(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))

    def __enter__(self) -> Curves:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def line(self, line: Mapping[str, Any]) -> None:
        """One exchange with the sites."""
        step = int(line["round"])
        for site, spent in line.get("epsilon", {}).items():
            for population, value in spent.items():
                self._add(f"epsilon/{population}/{site}", value, step)
        if line["kind"] == "train":
            self._add("round/seconds", line["seconds"], step)
            self._add("round/sites", len(line["sites"]), step)
            self._add("bytes/up", line["bytes_up"], step)
            self._add("bytes/down", line["bytes_down"], step)
        metrics = line.get("metrics")
        if metrics:
            for name, values in [*metrics["tasks"].items(), ("macro", metrics["macro"])]:
                for metric in ("auroc", "auprc", "precision", "recall", "f1"):
                    self._add(f"{metric}/{name}", values.get(metric), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, tag: str, value: float | None, step: int) -> None:
        if value is not None:
            # The plain kind, which `EventAccumulator.Scalars` reads; `tensorboard.summary` writes
            # tensors that only the web page shows as scalars.
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
