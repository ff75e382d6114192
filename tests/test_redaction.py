"""What is a secret, and output without it. What a whole run leaves behind is looked through in end_to_end/test_secrets.py."""

import io
import logging
import sys
import traceback
from typing import TextIO
from urllib.parse import quote

import pytest

from muybridge.redaction import (
    environment_without_secrets,
    is_secret_name,
    redact_output,
    redacted,
    secret_in,
    without_assigned_secrets,
)

SECRET_NAMES = [
    *(
        "WANDB_API_KEY",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "PGPASSWORD",
    ),
    *(
        "AWS_SESSION_TOKEN",
        "GITHUB_TOKEN",
        "SLURM_JWT",
        "AZURE_STORAGE_CONNECTION_STRING",
        "my_api_keys",
        "SSHPASS",
        "DB_PWD",
    ),
    *("STORAGE_SAS", "GITLAB_PAT", "GOOGLE_CREDENTIALS", "BASIC_AUTH", "APIKEY", "client_secret"),
]
OTHER_NAMES = [
    *("PWD", "OLDPWD", "PATH", "KEYBOARD", "TOKENIZERS_PARALLELISM", "TOKENIZER", "SSH_AUTH_SOCK", "HOME"),
    *("GOOGLE_CREDENTIALS_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "SECRETARY", "MASTER_PORT", "AUTHOR", "COMPATIBLE"),
    *("MONKEY", "PROXY_BYPASS", "MAX_TOKENS", "COMPASS"),
]
LOOK_LIKE_KEYS = [
    *(
        "hf_" + "a1B2" * 9,
        "sk-proj-" + "x1_-" * 8,
        "sk-" + "x1" * 24,
        "AKIA" + "ABCD" * 4,
        "ghp_" + "z9" * 18,
        "github_pat_" + "a_1" * 9,
    ),
    *("glpat-" + "a-1_" * 5, "xoxb-1234567890-abc", "AIza" + "Sy_-" * 9, "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.abc-123"),
    "wandb_v1_" + "Ab3" * 20,
]
NOT_KEYS = [
    "a photo of a risk-averse task-oriented desk-chair in the hf_studio",
    "0123456789abcdef0123456789abcdef01234567",  # a commit
    "/weights/models--a--b/snapshots/0123456789abcdef0123456789abcdef01234567/vae",
    "https://host:8080/shard-{000..127}.tar?versionId=12345678",
    "abfs://container@account.dfs.core.windows.net/shards/a.tar",
    "user@host:/path and <a@b.c>",
    "runs/sk-baseline-lr1e-4-seed0001",
    "the bearer of a red flag",
    "s3://bucket/a@b/c.tar",
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_name_says_that_there_is_a_secret(name: str) -> None:
    assert is_secret_name(name)
    assert is_secret_name(name.lower())


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names_do_not(name: str) -> None:
    assert not is_secret_name(name)


def test_values_of_secret_variables_are_replaced_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", 'abc/DEF+ghi"jkl')
    monkeypatch.setenv("SHORT_TOKEN", "abc/DEF+")  # a part of the other
    monkeypatch.setenv("TINY_KEY", "true")
    value = 'abc/DEF+ghi"jkl'
    assert redacted(f"key={value}; true") == "key=[AWS_SECRET_ACCESS_KEY]; true"
    assert redacted(f"?k={quote(value, safe='')}") == "?k=[AWS_SECRET_ACCESS_KEY]"
    assert redacted('{"k": "abc/DEF+ghi\\"jkl"}') == '{"k": "[AWS_SECRET_ACCESS_KEY]"}'
    assert redacted("abc/DEF+") == "[SHORT_TOKEN]"
    assert secret_in(f"a {value} b") == "the value of the environment variable AWS_SECRET_ACCESS_KEY"
    monkeypatch.setenv("LATER_TOKEN", "set after the start")
    assert redacted("set after the start") == "[LATER_TOKEN]"


@pytest.mark.parametrize("key", LOOK_LIKE_KEYS)
def test_what_looks_like_a_key_is_hidden_wherever_it_comes_from(key: str) -> None:
    assert redacted(f"with {key}, as") == "with [hidden], as"
    assert secret_in(key) == "a key"


@pytest.mark.parametrize("text", NOT_KEYS)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redacted(text) == text
    assert not secret_in(text)


def test_a_login_in_a_header_is_hidden() -> None:
    token = "abcd.EFGH-0123~456+/="
    assert redacted(f"{{'Authorization': 'Bearer {token}'}}") == "{'Authorization': 'Bearer [hidden]'}"
    assert redacted(f"authorization: Basic {token}\nx") == "authorization: Basic [hidden]\nx"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("+export WANDB_API_KEY=0123456789abcdef # mine", "+export WANDB_API_KEY=[hidden] # mine"),
        ("+DB_PASSWORD=correcthorse\n+x", "+DB_PASSWORD=[hidden]\n+x"),
        ("-  password: hunter2hunter2", "-  password: [hidden]"),
        ('+{"api_key": "correct horse battery", "n": 1}', '+{"api_key": "[hidden]", "n": 1}'),
        ("+    token = 'abc\"defghi'", "+    token = '[hidden]'"),
        ("+muybridge train tracking.api_key=abcdefg12", "+muybridge train tracking.api_key=[hidden]"),
        (f"+A_KEY={'0123456789' * 50} x", "+A_KEY=[hidden] x"),
        ("+env: HF_TOKEN=ab=cdef:ghi==, PGPASSWORD=abcdefgh", "+env: HF_TOKEN=[hidden], PGPASSWORD=[hidden]"),
    ],
)
def test_what_a_text_gives_to_a_secrets_name_is_hidden(text: str, hidden: str) -> None:
    assert without_assigned_secrets(text) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "+    rows = sorted(rows, key=by_the_name)",
        "+    key = projected(hidden)  # [B, L, D]",
        "+    token = tokenizer2.first_of",
        "+_KEYS = re.compile(pattern)",
        '+export HF_TOKEN="$MY_OWN_TOKEN" WANDB_API_KEY=$OTHER_KEY',
        "+def of(key: ParameterName, token: int) -> None:",
        "+HF_TOKEN=none",
        "+commit=0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_code_that_deals_with_keys_stays_as_it_is(text: str) -> None:
    assert without_assigned_secrets(text) == text


def test_urls_keep_their_host_and_lose_who_asks() -> None:
    assert redacted("GET https://me:pass%40@host:80/a.tar (404)") == "GET https://[hidden]@host:80/a.tar (404)"
    assert redacted("https://onlyatoken@host/a?x=1") == "https://[hidden]@host/a?x=1"
    signed = "https://host/a.tar?X-Amz-Credential=AAAAAAAA%2F&X-Amz-Signature=0123456789abcdef&x=1"
    assert redacted(signed) == "https://host/a.tar?X-Amz-Credential=[hidden]&X-Amz-Signature=[hidden]&x=1"
    assert secret_in(signed) == "a URL with a signature or a token"
    assert secret_in("https://me@host/a") == "a URL with a user's name or password"


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "a-",
        "a?b",
        "http://",
        "http://a",
        "?token",
        "&sig=",
        "eyJa",
        "sk-",
        "gh",
        "wandb_v1_",
        "bearer ",
        "key=",
        "key:'",
    ],
)
def test_long_lines_take_no_long_time(piece: str) -> None:
    """Were the time to grow with the square of the length, this would take minutes and run into the suite's limit."""
    redacted(piece * 500_000)
    without_assigned_secrets(piece * 500_000)


def test_an_environment_without_secrets_keeps_the_rest() -> None:
    given = {"HF_TOKEN": "abcdefgh", "A_KEY": "x", "HOME": "/home/me", "https_proxy": "http://me:pw@proxy", "EMPTY": ""}
    assert environment_without_secrets(given) == {"HOME": "/home/me", "EMPTY": ""}


def test_all_that_python_writes_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    handler = logging.StreamHandler()  # made before, as libraries do at their import
    redact_output()
    redact_output()
    print("printed", "canary-0123456789", end="!\n")
    sys.stdout.writelines(["canary-0123456789\n"])
    handler.emit(logging.LogRecord("x", 30, "", 0, "logged %s", ("canary-0123456789",), None))
    try:
        raise KeyError("canary-0123456789")
    except KeyError as error:
        traceback.print_exc()
        sys.__excepthook__(KeyError, error, error.__traceback__)
    assert sys.stdout.write("canary-0123456789") == len("canary-0123456789")
    written = [stream.buffer.getvalue().decode() for stream in (out, err)]
    assert written[0] == "printed [HF_TOKEN]!\n[HF_TOKEN]\n[HF_TOKEN]"
    assert written[1].startswith("logged [HF_TOKEN]\n")
    assert written[1].count("KeyError: '[HF_TOKEN]'") == 2


def test_a_stream_stays_what_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before: TextIO = sys.stderr
    redact_output()
    assert sys.stderr is before
    assert not sys.stderr.isatty()
