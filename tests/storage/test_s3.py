"""The connection to an S3 server: which keys it uses, which certificates it trusts, and what its errors hide."""

import datetime
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr

from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.storage import s3
from tests.storage.servers import KEY, SECRET, client_of, rclone, settings_of, shared_server

BUCKET, NAME = "bucket-of-keys", "raw/ü ~.txt"
WRONG = {"AWS_ACCESS_KEY_ID": "someone-else", "AWS_SECRET_ACCESS_KEY": "secret-of-someone-else"}
RIGHT = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
MISSING = "about: S3 needs a server and credentials; set {} (or the AWS variables for the keys)"


@pytest.fixture(scope="module")
def server() -> str:
    """URL of a server that knows one pair of keys, with a bucket."""
    url = shared_server("rclone")
    client_of(url).make_bucket(BUCKET)
    return url


def use(settings: Settings) -> None:
    """Write a small object and read it."""
    data = os.urandom(20)
    with s3.connect("about", settings) as client:
        client.remove_object(BUCKET, NAME)
        assert s3.put_if_absent(client, BUCKET, NAME, data)
        assert s3.read_object(client, BUCKET, NAME) == data


def refused(settings: Settings) -> str:
    """The error if the server refuses the keys."""
    with pytest.raises(ForgeError) as caught:
        use(settings)
    message = caught.value.format_message()
    assert "check FORGE_S3_ACCESS_KEY, FORGE_S3_SECRET_KEY" in message
    return message


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def profiles(path: Path, **secrets: str) -> Path:
    """A credentials file with a secret for each profile."""
    lines = "[{}]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    path.write_text("".join(lines.format(name, KEY, secret) for name, secret in secrets.items()))
    return path


# --- keys


def test_keys_of_the_settings_come_first(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_variables(monkeypatch, WRONG)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles(tmp_path / "file", default="wrong")))
    use(settings_of(server))
    set_variables(monkeypatch, RIGHT)
    refused(Settings(s3_endpoint=server, s3_access_key=SecretStr(KEY), s3_secret_key=SecretStr("wrong")))


def test_aws_variables_come_before_a_profile(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_variables(monkeypatch, RIGHT)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles(tmp_path / "file", default="wrong")))
    use(Settings(s3_endpoint=server))
    set_variables(monkeypatch, WRONG)
    profiles(tmp_path / "file", default=SECRET)
    refused(Settings(s3_endpoint=server))


def test_a_profile_of_the_credentials_file(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles(tmp_path / "file", default="wrong", mine=SECRET)))
    refused(Settings(s3_endpoint=server))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    use(Settings(s3_endpoint=server))
    profiles(tmp_path / "file", default=SECRET, mine="wrong")
    refused(Settings(s3_endpoint=server))
    monkeypatch.delenv("AWS_PROFILE")
    use(Settings(s3_endpoint=server))


@pytest.mark.parametrize("source", ["variables", "profile"])
def test_a_session_token_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    if source == "variables":
        set_variables(monkeypatch, {**RIGHT, "AWS_SESSION_TOKEN": "for-an-hour"})
    else:
        with profiles(tmp_path / "file", default=SECRET).open("a") as file:
            file.write("aws_session_token = for-an-hour\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "file"))
    with s3.connect("about", Settings(s3_endpoint="http://127.0.0.1:9")) as client:
        assert "X-Amz-Security-Token=for-an-hour&" in client.presigned_get_object(BUCKET, NAME)


def test_keys_of_the_settings_are_used_without_a_session_token(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "for-an-hour")
    with s3.connect("about", settings_of(server)) as client:
        assert "for-an-hour" not in client.presigned_get_object(BUCKET, NAME)
    use(settings_of(server))


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"s3_access_key": SecretStr(KEY)}, "FORGE_S3_SECRET_KEY"),
        ({"s3_secret_key": SecretStr(SECRET)}, "FORGE_S3_ACCESS_KEY"),
    ],
)
def test_a_single_key_is_not_completed_from_elsewhere(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict, missing: str
) -> None:
    set_variables(monkeypatch, RIGHT)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles(tmp_path / "file", default=SECRET)))
    with pytest.raises(ForgeError) as caught:
        use(Settings(s3_endpoint=server, **given))
    assert caught.value.message == MISSING.format(missing)


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_a_single_aws_variable_is_not_completed(server: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_variables(monkeypatch, {name: RIGHT[name]})
    with pytest.raises(ForgeError) as caught:
        use(Settings(s3_endpoint=server))
    assert caught.value.message == MISSING.format("FORGE_S3_ACCESS_KEY, FORGE_S3_SECRET_KEY")


@pytest.mark.parametrize("text", ["", "[other]\naws_access_key_id = a\naws_secret_access_key = b\n", "[default]\n"])
def test_a_credentials_file_without_the_profile(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    (tmp_path / "file").write_text(text)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "file"))
    with pytest.raises(ForgeError) as caught:
        use(Settings(s3_endpoint=server))
    assert caught.value.message == MISSING.format("FORGE_S3_ACCESS_KEY, FORGE_S3_SECRET_KEY")


@pytest.mark.parametrize("source", ["settings", "variables", "profile"])
def test_a_refused_secret_is_not_shown(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    wrong, settings = "no-secret-of-anyone", Settings(s3_endpoint=server)
    if source == "settings":
        settings = settings_of(server).model_copy(update={"s3_secret_key": SecretStr(wrong)})
    elif source == "variables":
        set_variables(monkeypatch, {**RIGHT, "AWS_SECRET_ACCESS_KEY": wrong})
    else:
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles(tmp_path / "file", default=wrong)))
    message = refused(settings)
    assert "SignatureDoesNotMatch" in message
    assert server in message
    assert wrong not in message
    assert wrong not in repr(settings)


# --- TLS


def certify(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a server of tests")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    (directory / "cert.pem").write_bytes(certificate.public_bytes(encoding))
    (directory / "key.pem").write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, no_password))
    return directory / "cert.pem", directory / "key.pem"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certify(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def secure(certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server behind TLS, with a bucket."""
    directory = tmp_path_factory.mktemp("secure")
    (directory / BUCKET).mkdir()
    with rclone(directory, certificate) as url:
        yield url


def test_a_certificate_is_trusted_by_ssl_cert_file(
    secure: str, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    use(settings_of(secure))


def test_an_untrusted_certificate_is_an_error(secure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(ForgeError, match=rf"^about: {secure} cannot be read .*SSL_CERT_FILE") as caught:
        use(settings_of(secure))
    assert SECRET not in caught.value.message


def test_another_certificate_or_host_name_is_an_error(
    secure: str, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(s3, "RETRIES", 0)
    monkeypatch.setenv("SSL_CERT_FILE", str(certify(tmp_path)[0]))
    with pytest.raises(ForgeError, match=f"^about: {secure} cannot be read .*self-signed certificate"):
        use(settings_of(secure))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    endpoint = secure.replace("127.0.0.1", "localhost")
    with pytest.raises(
        ForgeError, match=f"^about: {endpoint} cannot be read .*certificate is not valid for 'localhost'"
    ):
        use(settings_of(endpoint))


def test_a_server_without_tls_is_an_error(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "RETRIES", 0)
    endpoint = server.replace("http://", "https://")
    with pytest.raises(ForgeError, match=f"^about: {endpoint} cannot be read .*SSL"):
        use(settings_of(endpoint))


@pytest.mark.parametrize(
    "text",
    ["[default]\naws_secret_access_key {}\n", "aws_access_key_id = {}\n", "[default]\naws_secret_access_key = %{}\n"],
)
def test_an_unreadable_credentials_file_is_an_error_without_its_lines(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    (tmp_path / "credentials").write_text(text.format(SECRET))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with pytest.raises(ForgeError, match="the AWS credentials file cannot be read") as caught:
        use(Settings(s3_endpoint=server))
    assert SECRET not in caught.value.message


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_a_key_with_a_line_break_is_not_shown(server: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_variables(monkeypatch, {**RIGHT, name: "half\nother-half"})
    with pytest.raises(ForgeError, match="an S3 key contains a space, a line break") as caught:
        use(Settings(s3_endpoint=server))
    assert "half" not in caught.value.message


# --- URLs


@pytest.mark.parametrize("endpoint", ["http://s3.test:9000", "https://s3.test", "https://s3.test/"])
def test_a_bucket_is_in_the_path_or_the_host(endpoint: str) -> None:
    scheme, _, host = endpoint.rstrip("/").partition("://")
    for virtual, begins in ((False, f"{scheme}://{host}/rows/a/b?"), (True, f"{scheme}://rows.{host}/a/b?")):
        with s3.connect("about", settings_of(endpoint, s3_virtual_host=virtual)) as client:
            url = client.presigned_get_object("rows", "a/b")
        assert url.startswith(begins)
        assert SECRET not in url
