"""The URL of a source, read the same way for every broker; it may hold a password, which no text shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from ..errors import ConfigurationError


@dataclass(frozen=True)
class SourceUrl:
    """Its parts, unquoted. `hosts` is as written, without the user: one host, or several with commas."""

    scheme: str
    hosts: str
    path: str
    user: str | None
    password: str | None = field(repr=False)
    options: Mapping[str, str]

    @property
    def port(self) -> int | None:
        """The port of the only host. Raises ConfigurationError."""
        _, colon, port = self.hosts.rpartition("]")[2].partition(":")
        if not colon:
            return None
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigurationError(
                f"the source's URL ({self.scheme}://…): the port is no number up to 65535"
            )
        return int(port)

    @property
    def host(self) -> str:
        """The only host, without its port."""
        if self.hosts.startswith("["):
            return self.hosts[1:].partition("]")[0]
        return self.hosts.partition(":")[0]

    def number(self, name: str, default: int, *, least: int, most: int) -> int:
        """Return an option that is a whole number. Raises ConfigurationError."""
        given = self.options.get(name)
        if given is None:
            return default
        if not given.isdecimal() or not least <= int(given) <= most:
            raise ConfigurationError(
                f"the source's URL ({self.scheme}://…): {name} is no whole number from {least} to {most}"
            )
        return int(given)

    def one_of(self, name: str, choices: Collection[str], default: str) -> str:
        """Return an option that is one of these. Raises ConfigurationError."""
        given = self.options.get(name, default)
        if given not in choices:
            raise ConfigurationError(
                f"the source's URL ({self.scheme}://…): {name} is none of {', '.join(choices)}"
            )
        return given


def parsed(url: str, *, form: str, options: Collection[str]) -> SourceUrl:
    """Return the parts of a URL. `form` is what it should look like.

    Raises ConfigurationError, also for an option that is not among these: a misspelt one would be ignored.
    """
    try:
        parts = urlsplit(url.strip())
        given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:  # its text may hold a part of the password
        raise ConfigurationError(f"the source's URL cannot be read: it goes {form}") from None
    where = f"the source's URL ({parts.scheme}://…)"
    mistakes = [
        f"{where}: there is no option {name[:40]!r}: those are {', '.join(sorted(options))}"
        for name, _ in given
        if name not in options
    ]
    mistakes += [f"{where}: {name} is empty" for name, value in given if name in options and not value]
    if len({name for name, _ in given}) != len(given):
        mistakes.append(f"{where}: an option is given twice")
    if parts.fragment:
        mistakes.append(f"{where}: has a '#': in a password it goes as %23")
    if mistakes:
        raise ConfigurationError(*mistakes)
    login, at, hosts = parts.netloc.rpartition("@")
    user, colon, password = login.partition(":")
    return SourceUrl(
        scheme=parts.scheme,
        hosts=hosts.lower(),
        path=unquote(parts.path[1:]),
        user=unquote(user) if at else None,
        password=unquote(password) if colon else None,
        options=dict(given),
    )
