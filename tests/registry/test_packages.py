"""Packages as their readers get them: complete, verified and signed, or an error; on stores of every kind."""

import io
import multiprocessing
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from forge.core.contracts import Base
from forge.core.errors import ForgeError
from forge.core.settings import Settings
from forge.registry.mlflow_registry import open_registry
from forge.registry.packages import LocalBase, fetch_package, local_base, portable_name
from forge.registry.signature import check_keys
from forge.storage import open_store
from tests.register.packages import make, settings
from tests.storage.servers import client_of

__all__ = ["settings"]


def keys(directory: Path, name: str = "key") -> dict[str, Path]:
    """A new key pair, as settings."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    encoding = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
    return {"signing_key": private, "verify_key": public}


def elsewhere(settings: Settings) -> Settings:
    """Another machine with the same store, without local copies."""
    return settings.model_copy(update={"home": settings.home.parent / "elsewhere"}) if settings.store else settings


def change(settings: Settings, uri: str, name: str, data: bytes | None) -> None:
    """Replace a file of a package with other bytes, or delete it (None)."""
    if not settings.store:
        path = Path(unquote(urlsplit(uri).path)) / name
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        return
    client = client_of(settings.s3_endpoint)
    bucket, _, key = f"{uri}/{name}".removeprefix("s3://").partition("/")
    if data is None:
        client.remove_object(bucket, key)
    else:
        client.put_object(bucket, key, io.BytesIO(data), len(data))


def test_a_package_is_found_by_alias_version_or_uri(settings: Settings, tmp_path: Path) -> None:
    store = open_store(settings)
    uri, digest = make(tmp_path / "model", settings, store)
    client = open_registry(settings)
    client.create_registered_model("dates")
    client.create_model_version("dates", source=uri, tags={"package_digest": digest})
    client.set_registered_model_alias("dates", "champion", "1")
    for model_uri in ("models:/dates@champion", "models:/dates/1", uri):
        found = fetch_package(model_uri, settings, store)
        assert (found / "model.safetensors").read_bytes() == b"1" * 100_000
    assert uri.endswith(f"/models/dates/sha256-{digest}")


def test_the_same_model_with_the_same_evaluation_is_the_same_package(settings: Settings, tmp_path: Path) -> None:
    store = open_store(settings)
    first = make(tmp_path / "one", settings, store)
    assert make(tmp_path / "two", settings, store) == first
    assert make(tmp_path / "three", settings, store, evaluation="f" * 64) != first
    assert len(store.artifacts("models")) == 2


def test_the_model_card_has_the_hub_s_format(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    store = open_store(settings)
    model = {"location": "meta/llama", "revision": "abc"}
    uri, _ = make(tmp_path / "model", settings, store, base=model)
    _, head, text = (fetch_package(uri, settings, store) / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert (card["base_model"], card["library_name"], card["pipeline_tag"]) == (
        "meta/llama", "transformers", "text-generation",
    )  # fmt: skip
    assert card["model-index"][0]["results"][0]["metrics"] == [{"type": "score", "value": 0.75}]
    assert "| data set | sha256 dddd" in text


def test_the_card_of_an_adapter_names_its_base(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    store = open_store(settings)
    for number, (location, named) in enumerate({"meta/llama": "meta/llama", "/home/me/base": None}.items()):
        adapter = {"kind": "adapter", "rank": 4, "base": {"location": location, "revision": "abc"}}
        uri, _ = make(tmp_path / str(number), settings, store, **adapter)
        _, head, text = (fetch_package(uri, settings, store) / "README.md").read_text().split("---\n", 2)
        card = yaml.safe_load(head)
        assert (card.get("base_model"), card["library_name"]) == (named, "peft")
        assert f'from_pretrained("{named or "BASE"}")' in text


def test_local_base_opens_every_kind_of_location(settings: Settings, tmp_path: Path) -> None:
    store = open_store(settings)
    uri, digest = make(tmp_path / "model", settings, store)
    package = Base(location=uri, revision=digest)
    other_machine = elsewhere(settings)
    found = local_base(package, other_machine, open_store(other_machine))
    assert (Path(found.location) / "model.safetensors").read_bytes() == b"1" * 100_000
    assert found.revision == "", "a digest is not a revision of the Hub"
    assert portable_name(package) == f"models/dates/sha256-{digest}"
    for location, opened, name in (
        ("meta/llama", LocalBase("meta/llama", "abc"), "meta/llama"),
        (tmp_path.as_uri(), LocalBase(str(tmp_path)), ""),
        (str(tmp_path), LocalBase(str(tmp_path)), ""),  # as in older manifests
        ("", LocalBase("", "abc"), ""),
    ):
        other = Base(location=location, revision="abc")
        assert local_base(other, settings, store) == opened
        assert portable_name(other) == name
    assert Base(location="/home/me/a base").location == "file:///home/me/a%20base"


@pytest.mark.parametrize(
    ("model_uri", "message"),
    [
        ("models:/dates", "write it as models:/name@champion"),
        ("models:/dates@nobody", "no such version"),
        ("models:/dates/7", "no such version"),
        ("models:/nothing@champion", "no such version"),
        ("models:/dates/1", "is not a package of this digest"),
        ("/somewhere", "is not a package of this digest"),
    ],
)
def test_a_uri_without_a_package_is_an_error(tmp_path: Path, model_uri: str, message: str) -> None:
    settings = Settings(home=tmp_path)
    client = open_registry(settings)
    client.create_registered_model("dates")
    client.create_model_version("dates", source=f"file:///a/sha256-{'0' * 64}", tags={"package_digest": "1" * 64})
    with pytest.raises(ForgeError, match=message):
        fetch_package(model_uri, settings, open_store(settings))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flipped byte", "model.safetensors is damaged"),
        ("missing file", "config.json is missing"),
        ("extra file", "extra.json is not in the manifest"),
        ("wrong size", "model.safetensors (has 7 bytes, and its manifest says 100000|is damaged)"),
        ("manifest of another model", "(README.md|model.safetensors) (is damaged|has)|is missing"),
        ("another digest", "its digest is|is missing"),
    ],
)
def test_a_changed_package_is_rejected_by_file_name(
    settings: Settings, tmp_path: Path, damage: str, message: str
) -> None:
    uri, _ = make(tmp_path / "model", settings, open_store(settings))
    another, _ = make(tmp_path / "another", settings, open_store(settings), b"2", name="words")
    if damage == "flipped byte":
        change(settings, uri, "model.safetensors", b"1" * 50_000 + b"0" + b"1" * 49_999)
    elif damage == "missing file":
        change(settings, uri, "config.json", None)
    elif damage == "extra file":
        change(settings, uri, "extra.json", b"{}")
    elif damage == "wrong size":
        change(settings, uri, "model.safetensors", b"1" * 7)
    elif damage == "manifest of another model":
        change(
            settings,
            uri,
            "manifest.json",
            (fetch_package(another, settings, open_store(settings)) / "manifest.json").read_bytes(),
        )
    else:  # all files of another model
        for path in fetch_package(another, settings, open_store(settings)).iterdir():
            change(settings, uri, path.name, path.read_bytes())
    other_machine = elsewhere(settings)
    with pytest.raises(ForgeError, match=message):
        fetch_package(uri, other_machine, open_store(other_machine))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("none", "is not signed"),
        ("broken", "its signature model.sig is not one of"),
        ("another key's", "its signature model.sig is not one of"),
        ("another package's", "its signature model.sig is not one of"),
        ("manifest", "its signature model.sig is not one of"),
    ],
)
def test_a_bad_signature_is_rejected(settings: Settings, tmp_path: Path, damage: str, message: str) -> None:
    signing = settings.model_copy(update=keys(tmp_path))
    check_keys(signing)
    store = open_store(signing)
    uri, _ = make(tmp_path / "model", signing, store)
    other_machine = elsewhere(signing)
    reader = other_machine.model_copy(update={"signing_key": None})
    directory = fetch_package(uri, reader, open_store(reader))
    command = [Path(sys.executable).with_name("model_signing"), "verify", "key", directory]
    options = ["--signature", directory / "model.sig", "--public_key", signing.verify_key]
    subprocess.run([*command, *options], check=True, capture_output=True)  # as one can by hand
    if damage == "none":
        change(signing, uri, "model.sig", None)
    elif damage == "broken":
        change(signing, uri, "model.sig", b"{}")
    elif damage == "manifest":  # lists the same files, with other facts
        text = (directory / "manifest.json").read_bytes()
        change(signing, uri, "manifest.json", text.replace(b"0.75", b"0.99"))
    else:
        other = signing.model_copy(update=keys(tmp_path, "other")) if damage == "another key's" else signing
        seed = b"1" if damage == "another key's" else b"2"
        home = other.model_copy(update={"home": tmp_path / "other", "store": ""})
        their, _ = make(tmp_path / "their", home, open_store(home), seed)
        change(signing, uri, "model.sig", (fetch_package(their, home, open_store(home)) / "model.sig").read_bytes())
    fresh = reader.model_copy(update={"home": tmp_path / "fresh"}) if signing.store else reader
    with pytest.raises(ForgeError, match=message):
        fetch_package(uri, fresh, open_store(fresh))


def test_an_unsigned_package_is_signed_when_it_is_registered_again(settings: Settings, tmp_path: Path) -> None:
    uri, _ = make(tmp_path / "model", settings, open_store(settings))
    signing = settings.model_copy(update=keys(tmp_path))
    with pytest.raises(ForgeError, match="is not signed"):
        fetch_package(uri, signing, open_store(signing))
    assert make(tmp_path / "again", signing, open_store(signing))[0] == uri
    other_machine = elsewhere(signing)
    fetch_package(uri, other_machine, open_store(other_machine))


def test_keys_are_checked_in_advance(tmp_path: Path) -> None:
    pair, other = keys(tmp_path), keys(tmp_path, "other")
    (tmp_path / "text").write_text("no key")
    for given, message in (
        ({"signing_key": pair["signing_key"]}, "set that to the path of its public key"),
        ({**pair, "signing_key": tmp_path / "nowhere"}, "FORGE_SIGNING_KEY .*nowhere: cannot be used to sign"),
        ({**pair, "signing_key": tmp_path / "text"}, "FORGE_SIGNING_KEY .*text: cannot be used to sign"),
        ({**pair, "verify_key": tmp_path / "text"}, "FORGE_VERIFY_KEY .*text: is not a key"),
        ({**pair, "verify_key": other["verify_key"]}, "its signature model.sig is not one of FORGE_VERIFY_KEY"),
    ):
        with pytest.raises(ForgeError, match=message):
            check_keys(Settings(home=tmp_path, **given))
    check_keys(Settings(home=tmp_path, **pair))
    check_keys(Settings(home=tmp_path, verify_key=pair["verify_key"]))


def _fetch(settings: Settings, uri: str) -> int:
    return len((fetch_package(uri, settings, open_store(settings)) / "model.safetensors").read_bytes())


def test_many_processes_fetch_concurrently(settings: Settings, tmp_path: Path) -> None:
    uri, _ = make(tmp_path / "model", settings, open_store(settings))
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.starmap(_fetch, [(elsewhere(settings), uri)] * 8) == [100_000] * 8


def test_the_command_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path)
    uri, _ = make(tmp_path / "model", settings, open_store(settings))
    monkeypatch.setenv("FORGE_HOME", str(tmp_path))
    command = [Path(sys.executable).with_name("forge"), "fetch"]
    done = subprocess.run([*command, uri], capture_output=True, text=True, check=True)
    assert (Path(done.stdout.strip()) / "manifest.json").is_file()
    failed = subprocess.run([*command, "models:/dates"], capture_output=True, text=True)
    assert (failed.returncode, "Traceback" in failed.stderr) == (1, False)
    assert "write it as models:/name@champion" in failed.stderr
