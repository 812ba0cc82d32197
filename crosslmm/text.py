"""Text from elsewhere, before it is shown or written down: without credentials and control characters, names made safe.

Errors quote URIs, and data files name things as they like. What leaves the process goes through `redacted`, what a
terminal or a page shows also through `printable`, and what becomes a name in a record through `safe_name`.
"""

import hashlib
import os
import re
from urllib.parse import quote, unquote

from pydantic import ValidationError

_PARAMETER = re.compile(
    r"""((?:(?<=[?&;])(?:sig|key|auth|pass)
        |password|passwd|passphrase|pwd|secret|token|signature|credential|api[_-]?key|access[_-]?key(?:[_-]?id)?)
        (?:=|%3D))[^\s&"]+""",
    re.IGNORECASE | re.VERBOSE,
)
"""A parameter that holds a secret, in the query of a URI or in a driver's own syntax: `sslpassword=x`, `PWD%3Dx`."""
_AFTER_SCHEME = re.compile(
    r"""(?<=://)(?:[^\s,;|'"<>()\[\]{}]|[,;|'"<>()\[\]{}](?![A-Za-z][A-Za-z0-9+.-]{0,30}://))+"""
)
"""The rest of a URI, up to a space or to a delimiter with another URI after it."""

_SECRET_VARIABLE = re.compile(r"(PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_KEY|SECRET_KEY|API_KEY)$", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DELIMITERS = re.compile(r"[/@:?#&\s]")
"""Characters at which a parser may break a password in pieces, one of which its error then quotes."""
_SHORTEST_SECRET = 4
_SHORTEST_TOKEN = 16
"""User names are not secrets, but without a password one may be a token, which is longer [characters]."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters of terminals, of the direction of writing, and halves of surrogate pairs; no tab or newline."""

LONGEST_NAME = 220
"""Most characters of a name in a record. MLflow takes 250, with the prefixes that this package puts before some."""
_NAME_PART = re.compile(r"(?!\.{1,2}$)[\w.:-](?:[\w .:-]*[\w.:-])?")
_MAPPED = re.compile(r"-[0-9a-f]{12}$")

# jsonargparse's message for a key that takes a value of some type or null.
_OPTIONAL = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: .*Errors:\s+- (.*?)"
    r"\s+- Expected a <class 'NoneType'>\s+Given value type: \S+ \S+\s+Given value: (.*)",
    re.DOTALL,
)


def redacted(text: str) -> str:
    """Return a text with *** in place of every secret: user and password of URIs, secret parameters, and the values of
    this process's environment that are secret, of which an error may quote a part.

    Host, path and the other parameters stay, except where a URI is ambiguous: passwords may contain `/`, `?` and `@`,
    so `http://host:5000/a@b` is read as a password that begins with 5000.
    """
    if secrets := _environment_secrets():
        text = re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, secrets))})(?!\w)", "***", text)
    text = _AFTER_SCHEME.sub(_without_userinfo, text)
    return _PARAMETER.sub(r"\1***", text)


def _without_userinfo(match: re.Match[str]) -> str:
    host = _host_begins(match[0])
    return f"***@{match[0][host:]}" if host else match[0]


def without_credentials(uri: str) -> str:
    """Return a URI without user, password and secret parameters: it can be written down, and still names the place."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    place, mark, query = rest[_host_begins(rest) :].partition("?")
    kept = [part for part in query.split("&") if not _PARAMETER.search(f"?{part}")]
    return f"{scheme}://{place}{mark if kept else ''}{'&'.join(kept)}"


def holds_credentials(uri: str) -> bool:
    """Return whether a URI has a user, a password or a secret parameter."""
    return without_credentials(uri) != uri


def _host_begins(rest: str) -> int:
    """Return where the host begins in what follows the `://` of a URI; 0 without user and password.

    After `user:`, the last @ ends the password, which may hold any character; without a colon before the first slash,
    there is no password that could hold a slash.
    """
    authority = rest.partition("/")[0]
    return (rest if ":" in authority else authority).rfind("@") + 1


def _environment_secrets() -> list[str]:
    """Return the secrets in this process's environment, and the pieces of them that an error may quote, longest first.

    They are the values of variables like MLFLOW_TRACKING_PASSWORD, and the passwords in URIs, such as a proxy's.
    """
    secrets: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= 2 * _SHORTEST_SECRET:
            secrets.add(value)
        if (scheme := _SCHEME.match(value)) or name.lower().endswith("_proxy"):
            secrets |= _secrets_in(value[scheme.end() if scheme else 0 :])
    return sorted(secrets, key=lambda secret: (-len(secret), secret))


def _secrets_in(rest: str) -> set[str]:
    """Return the password in what follows the `://` of a URI, as it is, quoted, and in pieces; or a token in its place.

    What is also the user's name, or a part of the place, is left out: it would be hidden wherever it occurs.
    """
    host = _host_begins(rest)
    user, colon, password = rest[: max(host - 1, 0)].partition(":")
    if not colon:
        return {user, unquote(user)} if len(user) >= _SHORTEST_TOKEN else set()
    wholes = {password, unquote(password)}
    pieces = wholes.union(*map(_DELIMITERS.split, wholes))
    forms = {form for piece in pieces for form in (piece, unquote(piece), quote(piece, safe=""))}
    return {form for form in forms if len(form) >= _SHORTEST_SECRET and form != user and form not in rest[host:]}


def printable(text: str) -> str:
    """Return a text in which control characters are shown as escapes, so that a terminal or page does not obey them."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def one_printable_line(text: str) -> str:
    """Return a text as `printable` does, with its line ends and tabs as escapes too."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def in_brief(error: object, most: int = 300) -> str:
    """Return an error's text in one printable line of at most `most` characters, without credentials.

    Credentials are removed before the text is cut: half a URI could not be told from other text.
    """
    return printable(" ".join(redacted(str(error)).split()))[:most]


def safe_name(name: str, longest: int = LONGEST_NAME) -> str:
    """Return a name that MLflow and file systems accept, the same at each call and different for different names.

    A name stays as it is if its parts between slashes consist of letters, digits and `_.:- `. Otherwise other
    characters become `_`, and a digest of the name distinguishes it from others that look alike.

    >>> safe_name("validation/accuracy/colour"), safe_name("what?")
    ('validation/accuracy/colour', 'what_-2cc9a59ae14e')
    """
    parts = name.split("/")
    if len(name) <= longest and all(map(_NAME_PART.fullmatch, parts)) and not _MAPPED.search(name):
        return name
    readable = [re.sub(r"[^\w.:-]+", "_", part) for part in parts]
    kept = "/".join("_" if part in ("", ".", "..") else part for part in readable)
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{kept[: longest - len(digest) - 1]}-{digest}"


def one_line(text: str) -> str:
    """Return an error's text as one line, without what pydantic and jsonargparse add about themselves."""
    text = re.sub(r"\d+ validation errors? for \S+|\[type=[^]]*\]|For further information visit \S+", "", text)
    text = _OPTIONAL.sub(r"\1; got: \2", text).replace("a typing.Literal", "one of ")
    return (
        " ".join(text.replace("Parser key ", "").replace(" Got value", "; got").split())
        .replace(".;", ";")
        .replace(" ;", ";")
    )


def first_error(error: Exception) -> str:
    """Return why foreign data is malformed: the first of pydantic's errors, or the text of another one. It is one line
    of up to 300 characters without escape sequences or credentials, since it quotes the data."""
    if not isinstance(error, ValidationError):
        return in_brief(error)
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return in_brief(f"{key}: {message}" if key else message)
