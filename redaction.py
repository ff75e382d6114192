"""Secrets stay where they are: which environment variables hold one, what in a text looks like one, and output without them.

Every part of the package may import this file, which imports none of them.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any
from urllib.parse import quote

# A part of a variable's name that ends in one of these says that its value is a secret: HF_TOKEN, PGPASSWORD, AWS_ACCESS_KEY_ID;
# but not MONKEY, PROXY_BYPASS, MAX_TOKENS.
_SECRET_NAME = re.compile(
    r"((?<!MON)KEY|(?<!MAX_)(?<!NUM_)TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|(?<!BY)(?<!COM)PASS|CREDENTIAL|COOKIE|JWT|_PWD"
    r"|(^|_)(AUTH|PAT|SAS)|CONNECTION_STRING)S?(_|$)",
    re.IGNORECASE,
)
# Unless it says that the value is a place where one lies.
_PLACE_NAME = re.compile(r"_(FILE|PATH|DIR|SOCK|URL|URI)$", re.IGNORECASE)
# A shorter value ("false", "none", "2") is no secret, and to replace it everywhere would make nonsense of the output.
MIN_SECRET_CHARACTERS = 8
# How keys begin that say by themselves what they are.
_KEYS = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-((proj|ant|or|svcacct|admin)-[\w-]{20,}|\w{20,})|(AKIA|ASIA)[A-Z0-9]{16}|gh[opsur]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|xox[abeoprs]-[\w-]{10,}|AIza[\w-]{30,}|wandb_v\d_\w{20,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
)
# In a URL: a user's name and password before the host, and a query that signs or logs in. The user's name may be a token; what
# Azure's URLs have there is a container.
_USER_IN_URL = re.compile(r"(\b(?!abfss?:|wasbs?:)[A-Za-z][A-Za-z0-9+.-]{0,19}://)[^/?#\s'\"@]+@")
_SIGNED_QUERY = re.compile(
    r"([?&](sig|[a-z-]*signature|[a-z-]*credential|[a-z_-]*token|[a-z_-]*api_?key|password)=)[^&#\s'\"]{8,}",
    re.IGNORECASE,
)
# In the header of a request.
_LOGIN = re.compile(r"\b((authorization['\"]?\s?[:=]\s?['\"]?\w{1,20}|bearer)\s)[\w.~+/=-]{16,}", re.IGNORECASE)
# NAME=VALUE, NAME: VALUE or "NAME": "VALUE" as shells, YAML, JSON and Python write it: what stands before the value, and that.
_ASSIGNMENT = re.compile(r"(?<!\w)(\w{1,80}+)(['\"]?[ \t]{0,8}[=:][ \t]{0,8})")
# Of a long bare word the beginning tells.
_BARE = r"[^\s'\"(){}\[\],;$<>|&]"
_ASSIGNED = re.compile(
    rf"\"(?P<double>[^\"\n]{{8,}})\"|'(?P<single>[^'\n]{{8,}})'|(?P<bare>{_BARE}{{8,200}}+)(?![({{\[])"
)
_REST = re.compile(rf"{_BARE}*+")


@cache
def is_secret_name(name: str) -> bool:
    """Whether a variable or setting of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None and _PLACE_NAME.search(name) is None


def environment_without_secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment (that of this process) for a process that has no use for secrets."""
    variables = os.environ if environment is None else environment
    return {
        name: value for name, value in variables.items() if not is_secret_name(name) and not _USER_IN_URL.search(value)
    }


def redacted(text: str) -> str:
    """The text with [NAME] for the value of each environment variable that is a secret, and [hidden] for what looks like one."""
    for name, value in _secrets():
        for form in {value, quote(value, safe=""), json.dumps(value)[1:-1]}:
            text = text.replace(form, f"[{name}]")
    text = _LOGIN.sub(r"\1[hidden]", _KEYS.sub("[hidden]", text))
    return _SIGNED_QUERY.sub(r"\1[hidden]", _USER_IN_URL.sub(r"\1[hidden]@", text))


def without_assigned_secrets(text: str) -> str:
    """The text of files, such as a `git diff`, with [hidden] for what is assigned to a secret's name: WANDB_API_KEY=0123..."""
    pieces, position = [], 0
    for match in _ASSIGNMENT.finditer(text):
        if match.start() < position or not is_secret_name(match[1]):
            continue
        value = _ASSIGNED.match(text, match.end())
        if value is not None and _may_be_secret(match, value):
            pieces += [text[position : value.start(value.lastgroup or 0)], "[hidden]"]
            end = value.end(value.lastgroup or 0)
            rest = _REST.match(text, end)
            position = rest.end() if rest is not None and value.lastgroup == "bare" else end
    return "".join([*pieces, text[position:]])


def _may_be_secret(assignment: re.Match[str], value: re.Match[str]) -> bool:
    """Whether a value is none of what code gives to such a name: `key=by_name`, `token = next(tokens)`, "$HF_TOKEN"."""
    text, name, sign = value[value.lastgroup or 0], assignment[1], assignment[2]
    if value.lastgroup != "bare":
        return not text.startswith("$")
    if name.isupper() and sign == "=":
        return True  # as in shells and files of variables
    is_code = sign.strip() == "=" and sign != "="
    return not is_code and bool(re.search("[0-9]", text) and re.search("[A-Za-z]", text))


def without_secrets(value: Any) -> Any:
    """What JSON is to be made of, with all its texts `redacted`; numbers and the names of fields stay."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {name: without_secrets(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(part) for part in value]
    return value


def secret_in(text: str) -> str:
    """What kind of secret a text holds, in words that do not repeat it; "" for none."""
    for name, value in _secrets():
        if value in text:
            return f"the value of the environment variable {name}"
    if _KEYS.search(text):
        return "a key"
    if _USER_IN_URL.search(text):
        return "a URL with a user's name or password"
    return "a URL with a signature or a token" if _SIGNED_QUERY.search(text) else ""


def redact_output() -> None:
    """From here on, nothing that Python writes to stdout and stderr (prints, logs, tracebacks) holds a secret. May be called again.

    The streams stay the objects that they are, so that whoever took hold of one before writes without secrets as well.
    """
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        if not hasattr(stream, "writes_secrets"):
            stream.writes_secrets, stream.write = False, _redacting(stream.write)


def _redacting(write: Callable[[str], int]) -> Callable[[str], int]:
    def write_redacted(text: str) -> int:
        write(redacted(text))
        return len(text)  # what the caller has got rid of

    return write_redacted


def _secrets() -> list[tuple[str, str]]:
    # The longest first: one may be a part of another. Read each time, as libraries set variables when a user logs in.
    found = [
        (name, value.strip())
        for name, value in os.environ.items()
        if is_secret_name(name) and len(value.strip()) >= MIN_SECRET_CHARACTERS
    ]
    return sorted(found, key=lambda pair: -len(pair[1]))
