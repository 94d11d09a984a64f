"""Credentials are found, also by the quick check of single words, and ordinary texts are not mistaken for them."""

from base64 import b64encode

import pytest

from tasks.preprocess.secrets import DETECTORS, find_secret, suspect

RUN = "a1B2c3D4e5" * 10
SECRETS = {  # invented, and concatenated so that no scanner reports this file
    "AWS Access Key": ["AKIA" + "ABCDEFGH12345678", "aws_secret_key = '" + RUN[:40] + "'"],
    "Azure Storage Account access key": ["AccountKey=" + RUN[:88]],
    "Basic Auth Credentials": ["https://me:" + "hunter2@example.com", "postgres://a:" + "b@db"],
    "GitHub Token": ["ghp_" + RUN[:36], "github_pat_" + RUN[:82]],
    "GitLab Token": ["glpat-" + RUN[:20]],
    "JSON Web Token": [
        ".".join(b64encode(part).decode().rstrip("=") for part in (b'{"alg":"none"}', b'{"a":1}', b"x"))
    ],
    "Mailchimp Access Key": ["0123456789abcdef" * 2 + "-us5"],
    "NPM tokens": ["//registry.example.org/:_authToken=" + "npm_" + RUN[:36]],
    "OpenAI Token": ["sk-" + RUN[:20] + "T3BlbkFJ" + RUN[:20], "sk-proj-" + RUN[:48]],
    "Private Key": ["-----BEGIN RSA " + "PRIVATE KEY-----", "-----BEGIN OPENSSH " + "PRIVATE KEY-----"],
    "PyPI Token": ["pypi-AgEIcHlwaS5vcmc" + RUN[:80]],
    "SendGrid API Key": ["SG." + RUN[:22] + "." + RUN[:43]],
    "Slack Token": [
        "xoxb-" + "1-a",
        "xoxb-" + "12345-67890-abcdef",
        "https://hooks.slack.com/services/T0/B0/" + RUN[:24],
    ],
    "Square OAuth Secret": ["sq0csp-" + RUN[:43]],
    "Stripe Access Key": ["sk_live_" + RUN[:24]],
    "Telegram Bot Token": ["110201543:AA" + RUN[:33]],
    "Twilio API Key": ["AC" + "0123456789abcdef" * 2],
    "Hugging Face Token": ["hf_" + "abcdefghij" * 3 + "ABCD"],
    "Google API Key": ["AIza" + RUN[:35]],
    "Anthropic Key": ["sk-ant-" + RUN[:48]],
}


@pytest.mark.parametrize(
    ("kind", "secret"), [(kind, secret) for kind, secrets in SECRETS.items() for secret in secrets]
)
def test_credentials_are_found(kind: str, secret: str) -> None:
    text = f"Here it is: {secret} and now forget it."
    assert find_secret(text) == kind
    assert any(suspect(word) for word in text.split()), "the quick check must never miss what the full search finds"


def test_every_detector_has_an_example() -> None:
    assert {detector.secret_type for detector, _ in DETECTORS} <= set(SECRETS)


@pytest.mark.parametrize(
    "text",
    [
        "The laws of thermodynamics, see https://example.com/a?b=c@d",
        "ISO: 20 juni 1969",
        '{"date":"1969-06-20"}',
        "A PRIVATE conversation; AKIA is a fish, ASK me. SKATE.",
        "sk_live_ is the prefix of such keys, and ghp_ another one",
        "mail me at someone@example.com, or call 0123-456789",
    ],
)
def test_ordinary_texts_hold_no_credential(text: str) -> None:
    assert find_secret(text) is None
