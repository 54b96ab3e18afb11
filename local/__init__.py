"""Real parts for one machine, by pip alone: Valkey, PostgreSQL, Airflow, and what starts them in order.

Used by `make`, the demo, the tests and the benchmarks alike. Nothing here is imported by `producers` or
`tasks`, and nothing here is shipped.
"""
