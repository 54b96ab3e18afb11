"""Dagrelay inside Airflow 2.11 and 3.x: the only folder that imports `airflow`, and only where it runs.

Import what a DAG needs from its module, as with any provider: `producers.airflow.operators`, `.sensors`,
`.conf`. Nothing is loaded by this package itself, so that a DAG file is read as quickly as without it.
"""
