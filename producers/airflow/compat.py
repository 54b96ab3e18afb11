"""What Airflow 2.11 and 3.x call by other names: the one place that knows which of them runs here."""

from __future__ import annotations

try:  # Airflow 3
    from airflow.sdk import BaseOperator, BaseOperatorLink, BaseSensorOperator

    AIRFLOW_3 = True
except ImportError:
    from airflow.models.baseoperator import BaseOperator
    from airflow.models.baseoperatorlink import BaseOperatorLink
    from airflow.sensors.base import BaseSensorOperator

    AIRFLOW_3 = False

# What came to `airflow.sdk` later says nothing of which Airflow it is.

try:  # 3.1
    from airflow.sdk import BaseHook
except ImportError:
    from airflow.hooks.base import BaseHook

try:  # 3.1
    from airflow.sdk.timezone import parse as parse_datetime
except ImportError:
    from airflow.utils.timezone import parse as parse_datetime

try:  # 3.2
    from airflow.sdk.exceptions import (
        AirflowException,
        AirflowFailException,
        AirflowNotFoundException,
        AirflowSensorTimeout,
        AirflowSkipException,
    )
except ImportError:
    from airflow.exceptions import (
        AirflowException,
        AirflowFailException,
        AirflowNotFoundException,
        AirflowSensorTimeout,
        AirflowSkipException,
    )

try:  # 3.2
    from airflow.sdk.configuration import conf
except ImportError:
    from airflow.configuration import conf

try:  # 3.2
    from airflow.sdk.listener import get_listener_manager
except ImportError:
    from airflow.listeners.listener import get_listener_manager

try:
    from airflow.sdk.log import mask_secret
except ImportError:  # Airflow 2, and 3.0
    from airflow.utils.log.secrets_masker import mask_secret

__all__ = [
    "AIRFLOW_3",
    "AirflowException",
    "AirflowFailException",
    "AirflowNotFoundException",
    "AirflowSensorTimeout",
    "AirflowSkipException",
    "BaseHook",
    "BaseOperator",
    "BaseOperatorLink",
    "BaseSensorOperator",
    "conf",
    "get_listener_manager",
    "mask_secret",
    "parse_datetime",
]
