"""Text that is shown or written down: one line per error, and no credentials."""

import re

USERINFO = re.compile(r"(?<=://)(?:[^/\s@]*|[^/\s:@]*:(?!\d+(?:/|$))[^\s@]*)@")
"""User and password in a URI. Where a port would be, a password may contain slashes, as S3 keys do."""

# jsonargparse's message for a key that takes a value of some type or null.
_OPTIONAL = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: .*Errors:\s+- (.*?)"
    r"\s+- Expected a <class 'NoneType'>\s+Given value type: \S+ \S+\s+Given value: (.*)",
    re.DOTALL,
)


def redacted(text: str) -> str:
    """Return the text with *** in place of user and password in every URI."""
    return USERINFO.sub("***@", text)


def without_password(uri: str) -> str:
    """Return a URI without user and password, so that it can be written down."""
    scheme, separator, rest = uri.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def one_line(text: str) -> str:
    """Return an error's text as one line, without what pydantic and jsonargparse add about themselves."""
    text = re.sub(r"\d+ validation errors? for \S+|\[type=[^]]*\]|For further information visit \S+", "", text)
    text = _OPTIONAL.sub(r"\1; got: \2", text).replace("a typing.Literal", "one of ")
    return (
        " ".join(text.replace("Parser key ", "").replace(" Got value", "; got").split())
        .replace(".;", ";")
        .replace(" ;", ";")
    )
