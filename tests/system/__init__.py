"""The running stack with a real Airflow: looked at from outside, as those who use it do."""
