"""Find credentials in rows, since a model can repeat what it learned. https://github.com/Yelp/detect-secrets"""

import re

from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
from detect_secrets.plugins.base import BasePlugin
from detect_secrets.plugins.basic_auth import BasicAuthDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
from detect_secrets.plugins.jwt import JwtTokenDetector
from detect_secrets.plugins.mailchimp import MailchimpDetector
from detect_secrets.plugins.npm import NpmDetector
from detect_secrets.plugins.openai import OpenAIDetector
from detect_secrets.plugins.private_key import PrivateKeyDetector
from detect_secrets.plugins.pypi_token import PypiTokenDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.square_oauth import SquareOAuthDetector
from detect_secrets.plugins.stripe import StripeDetector
from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector
from detect_secrets.plugins.twilio import TwilioKeyDetector

from tasks.preprocess.rows import Invalid

# Each detector with its literals: every match contains one of them, so searching for those first is fast.
# Detectors that guess (by entropy, the word "key" or any IP address) are left out: they would reject good rows.
DETECTORS: tuple[tuple[BasePlugin, tuple[str, ...]], ...] = (
    (AWSKeyDetector(), ("AKIA", "ASIA", "ABIA", "ACCA", "A3T", "aws", "AWS", "Aws")),
    (AzureStorageKeyDetector(), ("AccountKey=",)),
    (BasicAuthDetector(), ("://",)),
    (GitHubTokenDetector(), ("ghp_", "gho_", "ghu_", "ghs_", "ghr_")),
    (GitLabTokenDetector(), ("GR1348941", "glpat-", "gldt-", "glft-", "glsoat-", "glrt-", "glcbt-", "glimt-", "glptt-",
                             "glagent-", "gloas-")),
    (JwtTokenDetector(), ("eyJ",)),
    (MailchimpDetector(), ("-us",)),
    (NpmDetector(), ("_authToken=",)),
    (OpenAIDetector(), ("T3BlbkFJ",)),
    (PrivateKeyDetector(), ("PRIVATE KEY", "PuTTY-User-Key-File-2")),
    (PypiTokenDetector(), ("pypi-",)),
    (SendGridDetector(), ("SG.",)),
    (SlackDetector(), ("xox", "hooks.slack.com")),
    (SquareOAuthDetector(), ("sq0csp-",)),
    (StripeDetector(), ("k_live_",)),
    (TelegramBotTokenDetector(), (":AA",)),
    (TwilioKeyDetector(), ("AC", "SK")),
)  # fmt: skip
_BY_LITERAL = [(literal, detector) for detector, literals in DETECTORS for literal in literals]
# Formats that detect-secrets 1.5 does not know.
NEWER = (
    ("GitHub Token", "github_pat_", re.compile(r"github_pat_[A-Za-z0-9_]{60,}")),
    ("Hugging Face Token", "hf_", re.compile(r"\bhf_[A-Za-z]{34}\b")),
    ("Google API Key", "AIza", re.compile(r"\bAIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])")),
    ("Anthropic Key", "sk-ant-", re.compile(r"\bsk-ant-[A-Za-z0-9_-]{40,}")),
    ("OpenAI Token", "sk-proj-", re.compile(r"\bsk-proj-[A-Za-z0-9_-]{40,}")),
)


# Literals that mark a word (between white space) as possibly part of a credential. An AWS secret key, which follows its
# name, is recognised by its length alone.
_SUSPICIOUS = tuple(literal.split()[0] for literal, _ in _BY_LITERAL) + tuple(literal for _, literal, _ in NEWER)
SHORTEST = 12  # characters of a word with a credential, except in URLs
LONG = 40  # characters from which every word is suspicious


def suspect(word: str) -> bool:
    """Whether a word could be part of a credential. A text without such a word holds none."""
    if len(word) < SHORTEST:
        return "://" in word or "PRIVATE" in word or "xox" in word
    return len(word) >= LONG or any(literal in word for literal in _SUSPICIOUS)


def find_secret(text: str) -> str | None:
    """The kind of the first credential in a text, or None. Never returns the credential itself."""
    for detector in [detector for literal, detector in _BY_LITERAL if literal in text]:
        for _ in detector.analyze_string(text):
            return str(detector.secret_type)
    for kind, literal, pattern in NEWER:
        if literal in text and pattern.search(text):
            return kind
    return None


def reject_secret(text: str) -> None:
    """Raise Invalid if a text holds a credential."""
    if kind := find_secret(text):
        raise Invalid(
            "secret", f"it holds a credential ({kind}); remove it, or set data.secrets to allow if it is not one"
        )
