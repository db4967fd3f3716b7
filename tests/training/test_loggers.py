"""The table of metrics across starts."""

from __future__ import annotations

import csv
from pathlib import Path

from kalle.training.callbacks import MetricsCSV


def rows(folder: Path, version: int = 0) -> list[dict[str, str]]:
    with (folder / "csv" / f"version_{version}" / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_rows_and_columns_grow(tmp_path: Path) -> None:
    table = MetricsCSV(str(tmp_path))
    table.log_metrics({"lr": 0.1}, step=0)
    table.log_metrics({"loss": 2.5, "lr": 0.2}, step=1)
    assert rows(tmp_path) == [{"lr": "0.1", "step": "0"}, {"loss": "2.5", "lr": "0.2", "step": "1"}]


def test_numbers_survive_to_the_last_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    MetricsCSV(str(tmp_path)).log_metrics({"loss": value}, step=0)
    assert float(rows(tmp_path)[0]["loss"]) == value


def test_a_resumed_run_replaces_what_was_logged_behind_its_checkpoint(tmp_path: Path) -> None:
    table = MetricsCSV(str(tmp_path))
    for step in range(5):
        table.log_metrics({"loss": float(step)}, step=step)
    path = tmp_path / "csv" / "version_0" / "metrics.csv"
    with path.open("a") as file:
        file.write("5.0,")  # killed in the middle of a row
    resumed = MetricsCSV(str(tmp_path), resume_step=3)
    resumed.log_metrics({"loss": 30.0, "other": 1.0}, step=3)
    assert [row["loss"] for row in rows(tmp_path)] == ["0.0", "1.0", "2.0", "30.0"]
    assert resumed.version == 0


def test_a_start_from_the_first_step_leaves_the_old_table_alone(tmp_path: Path) -> None:
    MetricsCSV(str(tmp_path)).log_metrics({"loss": 1.0}, step=0)
    anew = MetricsCSV(str(tmp_path))
    anew.log_metrics({"loss": 2.0}, step=0)
    assert anew.version == 1
    assert [rows(tmp_path, version)[0]["loss"] for version in (0, 1)] == ["1.0", "2.0"]
    MetricsCSV(str(tmp_path), resume_step=1).log_metrics({"loss": 3.0}, step=1)
    assert [row["loss"] for row in rows(tmp_path, 1)] == ["2.0", "3.0"]


def test_a_table_that_is_gone_begins_where_the_run_stands(tmp_path: Path) -> None:
    MetricsCSV(str(tmp_path), resume_step=8).log_metrics({"loss": 1.0}, step=8)
    assert rows(tmp_path) == [{"loss": "1.0", "step": "8"}]


def test_a_run_killed_before_its_first_checkpoint_begins_its_table_anew(tmp_path: Path) -> None:
    MetricsCSV(str(tmp_path)).log_metrics({"loss": 1.0}, step=0)
    MetricsCSV(str(tmp_path), resume_step=0).log_metrics({"loss": 2.0}, step=0)
    assert rows(tmp_path) == [{"loss": "2.0", "step": "0"}]
    MetricsCSV(str(tmp_path / "other"), resume_step=0).log_metrics({"loss": 3.0}, step=0)
    assert rows(tmp_path / "other") == [{"loss": "3.0", "step": "0"}]
