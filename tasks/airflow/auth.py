"""How a request is authorised: nothing, basic auth, a static bearer token, or a token that is logged in for.

One object for each connection, process and version of the API; safe to use from threads.
"""

from __future__ import annotations

import base64
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from producers.errors import AirflowError, AirflowUnavailable, CredentialsRefused
from tasks.airflow.answers import JSON_HEADERS, json_body, scrubbed, somebody_else, unavailable
from tasks.airflow.connections import AirflowConnection, ApiVersion
from tasks.airflow.protocol_v2 import own_words
from tasks.airflow.single_flight import SingleFlight
from tasks.http import HttpRequest, HttpResponse, NoAnswer

log = logging.getLogger("dagrelay.airflow")

Send = Callable[[HttpRequest], HttpResponse]
Now = Callable[[], float]

REFRESH_AT: Final = 0.8
"""A token is renewed when this part of its life is over: of Airflow's 24 h, nearly 5 h before the end."""

LIFE_IF_UNTOLD_S: Final = 3600.0
REFRESH_AGAIN_AFTER_S: Final = 60.0

_NOT_ASKED_FOR = (404, 405)


class Authorisation(Protocol):
    """What the client needs of each way."""

    def headers(self) -> Mapping[str, str]:
        """Return the headers that authorise a request.

        Raises AirflowUnavailable(unsure=False) or CredentialsRefused if there is no token to be had.
        """

    def refused(self, headers: Mapping[str, str]) -> bool:
        """Hear that these headers were refused; tell whether to ask for others and try again."""


def authorisation(connection: AirflowConnection, api: ApiVersion, send: Send, now: Now) -> Authorisation:
    """Return the way in which requests to this connection are authorised."""
    if connection.token is not None:
        return Fixed({"Authorization": f"Bearer {connection.token}"})
    if api == "v2":
        return LoginTokens(connection, send, now)
    if connection.username is not None:
        pair = f"{connection.username}:{connection.password or ''}".encode()
        return Fixed({"Authorization": f"Basic {base64.b64encode(pair).decode()}"})
    return Fixed({})


class Fixed:
    """Always the same headers: basic auth, a static token, or none."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers

    def headers(self) -> Mapping[str, str]:
        return self._headers

    def refused(self, headers: Mapping[str, str]) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class _Token:
    headers: Mapping[str, str]
    refresh_at: float
    expires_at: float


class LoginTokens:
    """Airflow 3's tokens: got with user and password from /auth/token, kept until 80 % of their life is over.

    However many threads need one at once, one of them logs in and all get what came of it. A connection
    without user asks for the token that a development Airflow gives to everybody
    (`simple_auth_manager_all_admins`), and goes without where there is none.
    """

    def __init__(self, connection: AirflowConnection, send: Send, now: Now) -> None:
        self._connection, self._send, self._now = connection, send, now
        self._login: SingleFlight[_Token] = SingleFlight()
        self._token: _Token | None = None

    def headers(self) -> Mapping[str, str]:
        """Return the headers with the token, after logging in if need be."""
        token, now = self._token, self._now()
        if token is not None and (now < token.refresh_at or (self._login.busy and now < token.expires_at)):
            return token.headers
        return self._login.do(self._renewed).headers

    def refused(self, headers: Mapping[str, str]) -> bool:
        """Forget the token if it is still the one that was refused; another thread may have a new one."""
        token = self._token
        if token is not None and token.headers is headers:
            self._token = None
        return bool(headers)

    def _renewed(self) -> _Token:
        """Log in, unless another thread just did. A token that still lives outlasts a failed renewal."""
        token, now = self._token, self._now()
        if token is not None and now < token.refresh_at:
            return token
        try:
            token = self._ask()
        except AirflowError as exc:
            if token is None or now >= token.expires_at:
                raise
            log.warning("early renewal of the token failed connection=%s: %s", self._connection.id, exc)
            token = replace(token, refresh_at=now + REFRESH_AGAIN_AFTER_S)
        self._token = token
        return token

    def _ask(self) -> _Token:
        connection = self._connection
        if connection.username is None:
            request = HttpRequest("GET", "/auth/token")
        else:
            credentials = {"username": connection.username, "password": connection.password or ""}
            request = HttpRequest("POST", "/auth/token", JSON_HEADERS, json_body(credentials))
        try:
            response = self._send(request)
        except NoAnswer as exc:
            raise AirflowUnavailable(f"no answer to the login: {exc.reason}", None, False) from None
        asked_at = self._now()
        answer = response.json()
        value = answer.get("access_token") if isinstance(answer, dict) else None
        if (
            response.status in (200, 201)
            and isinstance(value, str)
            and value.isascii()
            and value.isprintable()
        ):
            life_s = life_of_token_s(value, asked_at)
            log.info("logged in connection=%s token_life_s=%.0f", connection.id, life_s)
            return _Token(
                {"Authorization": f"Bearer {value}"}, asked_at + REFRESH_AT * life_s, asked_at + life_s
            )
        words = own_words(response)
        if connection.username is None and 400 <= response.status < 500 and response.status != 429:
            return _Token({}, math.inf, math.inf)
        if response.status in _NOT_ASKED_FOR and isinstance(answer, dict):
            raise CredentialsRefused(
                connection.id,
                "this Airflow gives no tokens for user and password (there is no POST /auth/token): "
                "give the connection a static token instead",
            )
        if words is not None and response.status in (400, 401, 403, 415, 422):
            raise CredentialsRefused(connection.id, scrubbed(words, connection.password))
        error = unavailable(response) if response.status >= 429 else somebody_else(response)
        raise AirflowUnavailable(f"login: {error.reason}", error.retry_after_s, False)


def life_of_token_s(token: str, now: float) -> float:
    """Return how long a JSON Web Token that was made now is accepted, in seconds; 1 h if it does not tell.

    From its `iat` to its `exp`, both the server's, so that a wrong clock here or there does no harm.
    Its signature is the server's business. Source: RFC 7519, section 4.1.
    """
    try:
        payload = token.split(".")[1]
        claims: Any = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        life_s = float(claims["exp"]) - float(claims.get("iat", now))
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError):
        return LIFE_IF_UNTOLD_S
    return life_s if 0 < life_s < math.inf else LIFE_IF_UNTOLD_S
