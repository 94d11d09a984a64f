"""Credentials in rows: what a model learns it can say. The patterns are detect-secrets' (https://github.com/Yelp/detect-secrets)."""

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

# Each detector with the literals of which one stands in whatever it finds: looking for those first makes it fast.
# Left out are the detectors that guess (by entropy, by the word "key", by any address), which would refuse good rows.
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
# Forms younger than detect-secrets 1.5.
YOUNGER = (
    ("GitHub Token", "github_pat_", re.compile(r"github_pat_[A-Za-z0-9_]{60,}")),
    ("Hugging Face Token", "hf_", re.compile(r"\bhf_[A-Za-z]{34}\b")),
    ("Google API Key", "AIza", re.compile(r"\bAIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])")),
    ("Anthropic Key", "sk-ant-", re.compile(r"\bsk-ant-[A-Za-z0-9_-]{40,}")),
    ("OpenAI Token", "sk-proj-", re.compile(r"\bsk-proj-[A-Za-z0-9_-]{40,}")),
)


# What stands in a word, as white space parts them, that is part of a credential. An AWS secret key, which follows its
# name, is known by its length alone.
_SUSPECT = tuple(literal.split()[0] for literal, _ in _BY_LITERAL) + tuple(literal for _, literal, _ in YOUNGER)
SHORTEST, LONG = 12, 40  # characters: of a word that holds a credential, but for URLs; of one that may be nothing else


def suspect(word: str) -> bool:
    """Whether a word could be part of a credential; a text without such a word holds none."""
    if len(word) < SHORTEST:
        return "://" in word or "PRIVATE" in word or "xox" in word
    return len(word) >= LONG or any(literal in word for literal in _SUSPECT)


def find_secret(text: str) -> str | None:
    """The kind of the first credential in a text, or None. The credential itself is never returned."""
    for detector in [detector for literal, detector in _BY_LITERAL if literal in text]:
        for _ in detector.analyze_string(text):
            return str(detector.secret_type)
    for kind, literal, pattern in YOUNGER:
        if literal in text and pattern.search(text):
            return kind
    return None


def refuse_secret(text: str) -> None:
    """Raise Invalid if a text holds a credential."""
    if kind := find_secret(text):
        raise Invalid(
            "secret", f"it holds a credential ({kind}); take it out, or set data.secrets to allow if it is none"
        )
