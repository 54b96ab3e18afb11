"""What a source's URL may say, and what is said of one that is wrong: never a secret."""

from __future__ import annotations

import ssl
from typing import Any

import pytest

from producers.errors import ConfigurationError
from producers.queues.kafka import KafkaSource
from producers.queues.rabbitmq import RabbitSource
from producers.queues.sources import source_for
from producers.queues.sqs import SqsSource

SECRET = "hunter2"


def test_rabbitmq_s_parts_and_what_is_left_out():
    full = RabbitSource.from_url(
        f"amqps://ann:{SECRET}%2F@MQ.example:5999/sales%2Feu?queue=q&dead=d&prefetch=7&ca=/ca.pem&name=here"
    )
    assert (full.queue, full.dead, full.name) == ("q", "d", "here")
    assert full._reach["password"] == f"{SECRET}/"
    assert full._reach["virtual_host"] == "sales/eu"
    assert full._reach["ssl"] == {
        "cert_reqs": ssl.CERT_REQUIRED,
        "server_hostname": "mq.example",
        "ca_certs": "/ca.pem",
    }
    plain = RabbitSource.from_url("amqp://mq?queue=q")
    assert (plain.dead, plain.name) == ("q.dead", "rabbitmq:mq:5672//q")
    assert plain._reach["virtual_host"] == "/"


def test_sqs_s_parts_and_what_is_left_out():
    full = SqsSource.from_url(f"sqs://KEY:{SECRET}@?queue=q.fifo&region=eu-west-1&endpoint=http://h:1")
    assert (full.queue, full.dead, full.name) == ("q.fifo", "q-dead.fifo", "sqs:h:1/q.fifo")
    assert full._reach["aws_secret_access_key"] == SECRET
    plain = SqsSource.from_url("sqs://?queue=q&region=eu-west-1")
    assert (plain.dead, plain.name) == ("q-dead", "sqs:eu-west-1/q")


def test_kafka_s_parts_and_the_client_s_configuration():
    environ = {"DAGRELAY_KAFKA_CONFIG": f'{{"sasl.password": "{SECRET}", "ssl.ca.location": "x"}}'}
    source = KafkaSource.from_url("kafka://b:9092,a:9092/t?group=g", environ)
    assert (source.topic, source.dead, source.name) == ("t", "t.dead", "kafka:a:9092,b:9092/t")
    assert source._reach["bootstrap.servers"] == "b:9092,a:9092"
    assert source._reach["sasl.password"] == SECRET


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"amqp://ann:{SECRET}@?queue=q", "names no host"),
        (f"amqp://ann:{SECRET}@mq/", "queue is missing"),
        (f"amqp://ann:{SECRET}@mq?queue=q&prefetsch=3", "no option 'prefetsch'"),
        (f"amqp://ann:{SECRET}@mq?queue=q&prefetch=0", "prefetch is no whole number from 1"),
        (f"amqp://ann:{SECRET}@mq?queue=q&prefetch=", "prefetch is empty"),
        (f"amqp://ann:{SECRET}@mq?queue=q&queue=r", "given twice"),
        (f"amqp://ann:{SECRET}@mq?queue=q&dead=q", "dead is the queue itself"),
        (f"amqp://ann:{SECRET}@mq?queue=q&type=stream", "type is none of quorum, classic"),
        (f"amqp://ann:{SECRET}@mq?queue=q&ca=x", "ca is for amqps://"),
        (f"amqp://ann:{SECRET}@mq:port?queue=q", "the port is no number"),
        (f"amqp://ann:x#{SECRET}@mq?queue=q", "'#'"),
        (f"amqp://ann:{SECRET}@[mq?queue=q", "cannot be read"),
        (f"amqp://mq?queue={'q' * 252}", "over 255 bytes"),
        (f"sqs://KEY:{SECRET}@host/x?queue=q", "names no host"),
        (f"sqs://KEY:{SECRET}@?region=eu", "queue is missing"),
        ("sqs://?queue=a%20b", "queue is a name"),
        ("sqs://?queue=q.fifo&dead=d", "both FIFO"),
        ("sqs://KEY@?queue=q", "KEY:SECRET@"),
        ("sqs://?queue=q&endpoint=x", "endpoint goes https://"),
        (f"kafka://ann:{SECRET}@h:1/t", "DAGRELAY_KAFKA_CONFIG"),
        ("kafka:///t", "names no host"),
        ("kafka://h:9092", "names no topic"),
        ("kafka://h:9092/a%20b", "a topic is named by"),
        ("kafka://h:9092/t?dead=t", "dead is the topic itself"),
    ],
)
def test_a_wrong_url_is_told_without_its_password(url: str, said: str):
    with pytest.raises(ConfigurationError) as told:
        source_for(url)
    assert said in str(told.value)
    assert SECRET not in str(told.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (f'{{"sasl.password": "{SECRET}"', "is no JSON"),
        (f'["{SECRET}"]', "no JSON object"),
        (f'{{"group.id": "{SECRET}"}}', "group.id is not to be set there"),
        ('{"enable.auto.commit": true}', "enable.auto.commit is not to be set there"),
        (f'{{"sasl.password": ["{SECRET}"]}}', "sasl.password is neither text"),
    ],
)
def test_a_wrong_configuration_of_kafka_is_told_without_its_values(config: str, said: str):
    with pytest.raises(ConfigurationError) as told:
        KafkaSource.from_url("kafka://h:9092/t", {"DAGRELAY_KAFKA_CONFIG": config})
    assert said in str(told.value)
    assert SECRET not in str(told.value)


@pytest.mark.parametrize(
    "source",
    [
        RabbitSource.from_url(f"amqp://ann:{SECRET}@mq?queue=q"),
        SqsSource.from_url(f"sqs://KEY:{SECRET}@?queue=q"),
        KafkaSource.from_url("kafka://h:1/t", {"DAGRELAY_KAFKA_CONFIG": f'{{"sasl.password": "{SECRET}"}}'}),
    ],
)
def test_nothing_that_is_shown_holds_a_secret(source: Any):
    assert SECRET not in repr(source)
    assert SECRET not in source.name
