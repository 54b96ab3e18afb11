"""Start Airflow DAG runs from any Python service: `trigger_dag.delay("daily_sales", conf={...})`."""
