"""Refresh every day with Airflow: the day's refresh, then minutes of service, then a return where the live metrics say so."""

import os
import subprocess
import urllib.request

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

    @task(retries=0)
    def watch(new: str, old: str) -> None:
        from aif_jax.refreshing import judge_service

        with urllib.request.urlopen(f"{os.environ['PRERANKER']}/metrics", timeout=10) as answer:
            reasons = judge_service(answer.read().decode(), new, old)
        if reasons:
            subprocess.run(["aif-jax", "rollback", "--out", OUT], check=True)
            raise AirflowFailException("; ".join(reasons))

    refresh() >> watch("{{ var.value.new_version }}", "{{ var.value.old_version }}")


refresh_preranker()
