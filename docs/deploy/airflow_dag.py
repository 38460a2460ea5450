"""Refresh every day with Airflow."""

import subprocess

import pendulum
from airflow.decorators import dag, task
from airflow.exceptions import AirflowFailException

OUT = "s3://models/preranker"
REFRESH = ["aif-jax", "refresh", "--events", "/data/events", "--items", "/data/items.parquet", "--out", OUT]
REFUSED = 3


@dag(schedule="15 3 * * *", start_date=pendulum.datetime(2026, 1, 1), catchup=False, max_active_runs=1)
def refresh_preranker():
    """One run a day; a task that fails is tried again and resumes."""

    @task(retries=5)
    def refresh() -> None:
        code = subprocess.run([*REFRESH, "--work", "/jobs/preranker", "--quiet"], check=False).returncode
        if code == REFUSED:
            raise AirflowFailException("the gate refused the model; its report is in OUT/reports")
        if code:
            raise RuntimeError(f"refresh: exit code {code}")

    refresh()


refresh_preranker()
