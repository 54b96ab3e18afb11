"""One worker serves an Airflow 3 and an Airflow 2 side by side."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from tests.system.stack import AirflowUnderTest, Stack


@pytest.fixture(scope="module")
def both(homes, tmp_path_factory, make_airflow):
    """Both Airflows, without what would run their DAGs: these were read when it ran before."""
    running = []
    try:
        for version in ("3", "2"):
            airflow = homes.get(version)
            if airflow is None:  # this test alone
                airflow = make_airflow(version)
                with airflow:
                    airflow.wait_until_read()
            airflow.components = ("api",)
            running.append(airflow.start(wait=False))
        for airflow in running:
            airflow.wait_healthy()
        yield {airflow.version: airflow for airflow in running}
    finally:
        for airflow in running:
            airflow.stop()


def test_each_request_goes_to_the_airflow_that_it_names(both: dict[str, AirflowUnderTest], tmp_path):
    stack = Stack(both["3"], tmp_path)
    try:
        worker = stack.start_worker(old=both["2"].conn_uri)
        new, old, nobody = stack.trigger(
            {"dag_id": "quiet", "key": "both"},
            {"dag_id": "quiet", "key": "both", "connection": "old"},
            {"dag_id": "quiet", "key": "both", "connection": "elsewhere"},
        )
        for said, version, name in ((new, "3", "default"), (old, "2", "old")):
            run = said["run"]
            assert (run["created"], run["connection"]) == (True, name)
            assert run["url"].startswith(both[version].url)
            assert new["id"] in both["3"].run("quiet", "relay__both")["note"]
            assert old["id"] in both["2"].run("quiet", "relay__both")["note"]
        assert nobody["error"] == "ConnectionNotConfigured"
        assert "AIRFLOW_CONN_ELSEWHERE" in nobody["text"]
        assert "version=3.3.2" in worker.text()
        assert "version=2.11.2" in worker.text()
    finally:
        stack.close()


def test_an_airflow_upgraded_under_a_running_worker_is_spoken_to_in_its_new_words(both, tmp_path):
    old, new = both["2"], both["3"]
    stack = Stack(old, tmp_path)
    try:
        proxy = stack.proxy()
        stack.start_worker(proxy.conn_uri(old.username, old.password))
        assert stack.trigger({"dag_id": "quiet", "key": "upgrade-1"})["run"]["created"]
        new.take_password(old.password)
        try:
            proxy.target = urlsplit(new.url)  # the same address is another release now
            upgraded = stack.trigger({"dag_id": "quiet", "key": "upgrade-2"})
            proxy.target = urlsplit(old.url)  # and back: the upgrade was no success
            returned = stack.trigger({"dag_id": "quiet", "key": "upgrade-3"})
        finally:
            new.take_password(new.password)
        assert upgraded["run"]["created"]
        assert returned["run"]["created"]
        assert new.run("quiet", "relay__upgrade-2")
        assert old.run("quiet", "relay__upgrade-2") is None
        assert old.run("quiet", "relay__upgrade-3")
    finally:
        stack.close()
