"""Passwords in URIs: whether there is one, and texts that may be shown.

What is printed, recorded or given on a command line (which Ray keeps, and shows in its dashboard)
must hold none.
"""

from __future__ import annotations

import re

HIDDEN = "***"
_USER = re.compile(r"(//[^/:@\s]*:)(?!\d+[/?#])(\S+)@")  # what is no port, up to the last @
_QUERY = re.compile(
    r"([?&][^=&\s]*(?:passw|pwd|secret|token|sig|credential|access_?key|odbc_connect)[^=&\s]*=)"
    r"[^&\s'\"]+",
    re.IGNORECASE,
)


def without_passwords(text: str) -> str:
    """A text with the passwords of its URIs hidden, those that nobody encoded too.

    >>> without_passwords("postgresql://me:a/b@c@host:5432/runs?sslmode=require is away")
    'postgresql://me:***@host:5432/runs?sslmode=require is away'
    >>> without_passwords("mysql://host/runs?user=me&password=abc&charset=utf8")
    'mysql://host/runs?user=me&password=***&charset=utf8'
    >>> without_passwords("http://host:5000/#/experiments/1?by=me@here")
    'http://host:5000/#/experiments/1?by=me@here'
    """
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))


def holds_password(uri: str) -> bool:
    """
    >>> holds_password("s3://key:sec/ret@bucket/rows"), holds_password("s3://bucket/a:b@c")
    (True, False)
    >>> holds_password("abfs://rows@account/x?client_secret=abc")
    True
    """
    return without_passwords(uri) != uri


def require_encoded_password(uri: str) -> None:
    """Refuse a URI that programs would cut at different places, and show parts of in their errors.

    >>> require_encoded_password("http://me:a%40b@host:5000")

    Raises:
        ValueError: naming no part of the password.
    """
    found = _USER.search(uri)
    if found and set(found[2]) & set("@/?#"):
        raise ValueError(
            "in a URI's password @ / ? # are written %40 %2F %3F %23; got one of them in "
            f"{without_passwords(uri)!r}. Encode it, or leave it out of the URI."
        )
