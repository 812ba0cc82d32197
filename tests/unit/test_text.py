"""Text from elsewhere: credentials in URIs, control characters, names of a record. Judged by MLflow's own rules."""

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_length_limit, _validate_metric_name, _validate_tag_name

from crosslmm.text import (
    holds_credentials,
    in_brief,
    one_printable_line,
    printable,
    redacted,
    safe_name,
    without_credentials,
)

PLACES = [
    "host",
    "host:5000",
    "host:5000/api/2.0/mlflow",
    "bucket/a/key with:colon".replace(" ", "_"),
    "db.example.org:5432/mlflow?sslmode=require&connect_timeout=3",
    "[::1]:5000/",
    "proxy.example.org:3128",
    "",
]
visible = st.characters(exclude_categories=("Z", "C"))
passwords = st.text(st.one_of(st.sampled_from("/@:#?&=%+.0123456789"), visible), min_size=1, max_size=40)
schemes = st.sampled_from(["http", "https", "postgresql+psycopg", "mysql+pymysql", "s3", "redis", "socks5"])
another_uri = re.compile(r"[,;|'\"<>()\[\]{}][A-Za-z][A-Za-z0-9+.-]*://")


@given(schemes, st.sampled_from(["user", "me@example.org", ""]), passwords, st.sampled_from(PLACES))
@example("http", "user", "12/34", "host:5000")
@example("http", "user", "5000/a", "host")
@example("http", "user", "p@ss:w#o?r/d", "host:5000/path")
@example("postgresql+psycopg", "user", "p%40ss%2Fword", PLACES[4])
def test_no_password_in_a_uri_is_shown(scheme, user, password, place):
    assume(not another_uri.search(password))
    uri = f"{scheme}://{user}:{password}@{place}"
    assert redacted(uri) == f"{scheme}://***@{place}"
    assert without_credentials(uri) == f"{scheme}://{place}"
    assert holds_credentials(uri)
    told = f"cannot reach {uri}, so {scheme}://other:5000/a was tried; and <{uri}>"
    place = f"{scheme}://***@{place}"
    assert redacted(told) == f"cannot reach {place}, so {scheme}://other:5000/a was tried; and <{place}>"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://dapi0123456789abcdef@host:443/x", "https://***@host:443/x"),
        ("https://user@host/x", "https://***@host/x"),
        ("redis://:secret@host/0", "redis://***@host/0"),
        ("postgresql://host/db?user=me&password=a/b#c", "postgresql://host/db?user=me&password=***"),
        ("postgresql://host/db?sslmode=require&sslpassword=a%26b", "postgresql://host/db?sslmode=require&sslpassword=***"),
        (
            "mssql+pyodbc:///?odbc_connect=DRIVER%3DODBC%3BSERVER%3Dhost%3BUID%3Dme%3BPWD%3Dabc%3B",
            "mssql+pyodbc:///?odbc_connect=DRIVER%3DODBC%3BSERVER%3Dhost%3BUID%3Dme%3BPWD%3D***",
        ),
        (
            "https://bucket.s3.amazonaws.com/a/b.mp4?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA%2F20260101"
            "&X-Amz-Expires=60&X-Amz-Security-Token=tok%2F&X-Amz-Signature=0ff",
            "https://bucket.s3.amazonaws.com/a/b.mp4?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=***"
            "&X-Amz-Expires=60&X-Amz-Security-Token=***&X-Amz-Signature=***",
        ),
        (
            "https://b/k?AWSAccessKeyId=AK&Expires=1&Signature=ss%3D",
            "https://b/k?AWSAccessKeyId=***&Expires=1&Signature=***",
        ),
        ("https://account.blob/c/x?sv=2024&sig=ab%2Bc&se=2026", "https://account.blob/c/x?sv=2024&sig=***&se=2026"),
        ("https://host/x?api_key=a1&page=2", "https://host/x?api_key=***&page=2"),
        ("http://a:5000,http://u:p/w@b:5001;s3://k:s@c/d", "http://a:5000,http://***@b:5001;s3://***@c/d"),
    ],
)  # fmt: skip
def test_every_way_in_which_uris_carry_secrets(uri, shown):
    assert redacted(uri) == shown
    assert redacted(f"a {uri} b") == f"a {shown} b"
    assert redacted(shown) == shown
    assert holds_credentials(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "http://host:5000/#/experiments/1/runs/2",
        "http://host:5000/ajax-api?order_by=a&filter=b",
        "http://host/a@b",
        "https://host/a:b@c",
        "http://[::1]:5000/x",
        "s3://bucket/a@b/c:d.mp4",
        "sqlite:////data/a:b@c.db",
        "sqlite:///mlflow.db?check_same_thread=false",
        "models:/crosslmm@candidate",
        "/data/me@host/rows.jsonl",
        "file:///data/a@b",
        "postgresql://db.example.org/mlflow?sslmode=require",
    ],
)
def test_places_stay_readable(uri):
    assert redacted(uri) == without_credentials(uri) == uri
    assert not holds_credentials(uri)
    text = f"record: {uri} refuses: models:/crosslmm@candidate, write to me@example.org"
    assert redacted(text) == text


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "https_proxy", "AWS_ENDPOINT_URL_S3", "DATABASE_URL"])
def test_what_errors_quote_of_a_password_is_not_shown(name, monkeypatch):
    """Parsers break a URI at the characters in its password, and complain about a piece of it."""
    monkeypatch.setenv(name, "http://user:kl1ngon/qu@rk#f3rengi%2Bneelix@host:5000/mlflow")
    told = [
        "Port could not be cast to integer value as 'kl1ngon'",
        'could not translate host name "rk#f3rengi%2Bneelix@host" to address',
        "label too long: f3rengi+neelix",
        "kl1ngon%2Fqu%40rk%23f3rengi%252Bneelix",
    ]
    for text in told:
        assert not re.search("kl1ngon|f3rengi|neelix", redacted(text)), text
    assert redacted("http://host:5000/mlflow of user") == "http://host:5000/mlflow of user"


def test_secret_variables_are_not_shown_and_common_words_are(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok3n-s3cr3t")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:mlflow@db/mlflow")
    monkeypatch.setenv("HTTP_PROXY", "runner:pr0xy-pass@proxy:3128")
    told = "Bearer tok3n-s3cr3t, wJalrXUtnFEMI/K7MDENG, pr0xy-pass of runner at proxy"
    assert redacted(told) == "Bearer ***, ***, *** of runner at proxy"
    assert redacted("postgresql://mlflow:mlflow@db/mlflow of mlflow") == "postgresql://***@db/mlflow of mlflow"


def test_errors_are_redacted_before_they_are_cut():
    error = ValueError("x" * 280 + " http://user:s3cr3t-and-long@host:5000/path")
    assert "s3cr3t" not in in_brief(error, 300)
    assert len(in_brief(error, 300)) == 300


def test_redaction_of_hostile_text_takes_no_longer_than_reading_it():
    for text in ("a://b:" * 50_000, "://" * 100_000, ",a" * 100_000 + "@", "token=" * 50_000, "x://" + "@:" * 100_000):
        redacted(text)  # quadratic, each would take hours: the suite's time limit is the test


NAMES = [
    "what?", "OCR & text", "", " ", "x" * 300, "..", "../loss", "a/../../b", "a//b", "/a", "a/", ".", "naïve?",
    "हिन्दी", "🦜", "a\nb", "a\n", "\x1b[31mred", "\x00", "\u202egnp.exe", "\ud800", "a\\b", "a:b?", "loss ",
    "what_-0123456789ab", "é" * 300,
]  # fmt: skip


@given(st.one_of(st.sampled_from(NAMES), st.text(st.characters(), max_size=300)))
def test_mlflow_accepts_every_safe_name(name):
    for whole in (name, f"validation/accuracy/{name}"):
        safe = safe_name(whole)
        _validate_metric_name(safe)
        _validate_tag_name(f"original_name/{safe}")
        _validate_length_limit("key", 250, f"original_name/{safe}")
        assert safe == safe_name(whole)
        assert safe == one_printable_line(safe)
        assert not {".", "..", ""} & set(safe.split("/"))


def test_different_names_stay_different():
    names = [*NAMES, "what!", "what_", "OCR _ text", "OCR_text", "_", "x" * 301, *map(safe_name, NAMES)]
    names = list(dict.fromkeys(names))
    assert len({safe_name(name) for name in names}) == len(names)
    assert len({safe_name(f"validation/accuracy/{name}") for name in names}) == len(names)


@pytest.mark.parametrize(
    "name", ["loss", "validation/accuracy/late digit", "lr/v2v", "scaling.train_on.crosslmm.io/role", "问题", "a-b.c:d"]
)
def test_good_names_stay(name):
    assert safe_name(name) == name


@given(st.text(st.characters()))
def test_no_control_character_is_printed(text):
    line = one_printable_line(text)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", line)
    line.encode()
    assert printable(printable(text)) == printable(text)


def test_printable_text_keeps_its_lines():
    assert printable("a\tb\nc\r\x1b]0;title\x07") == r"a" + "\tb\nc" + r"\r\x1b]0;title\x07"
