"""Everything about speaking to Airflow: which one (connections), in which words (protocol_v1 for Airflow 2,
protocol_v2 for Airflow 3, both pure), as whom (auth), and what an answer means (client)."""
