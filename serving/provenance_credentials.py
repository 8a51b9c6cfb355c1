"""C2PA content credentials: a signed manifest inside the file that says which model made the picture."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from serving.errors import ServeError
from serving.images import OutputFormat, encode_image
from serving.parameters import Parameters, software
from serving.provenance_config import CredentialsConfig, ProvenanceConfig
from training.errors import ConfigError

ASSERTION = "org.darkroom.picture"
"""The label of what the manifest says in our own words: the parameters without the prompts."""
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_PRIVATE = {"prompt", "negative_prompt"}
"""Signed for ever, a prompt could not be taken out of a file any more."""
_SETTINGS: dict[str, Any] = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}
"""A stranger's file makes the server ask nobody."""

State = Literal["trusted", "valid", "invalid", "absent"]
"""Of a manifest: signed by somebody we trust, by somebody, not as it says, or not there."""


@dataclass(frozen=True)
class Credentials:
    """What a file's manifest says.

    Attributes:
        state: whether it can be believed.
        signer: the certificate's organisation and name; None where nothing is signed.
        issued: when it was signed, as a time-stamping authority says.
        generator: the software that made the picture.
        picture: our own assertion, if there is one.
        problems: what is wrong, as C2PA codes.
    """

    state: State
    signer: str | None = None
    issued: str | None = None
    generator: str | None = None
    picture: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


class Signer:
    """Signs files; threads may share it. The key stays in memory and in no message.

    Args:
        config: certificate and key.

    Raises:
        ConfigError: they cannot be read, or do not belong together.
    """

    def __init__(self, config: CredentialsConfig) -> None:
        import c2pa

        self._chain = _read(config.certificate, "certificate")
        self._sign = _signing(config, self._chain)
        self._algorithm = c2pa.C2paSigningAlg[config.algorithm.upper()]
        self._timestamp_url = config.timestamp_url
        self.sign(_probe(), "png", None)

    def sign(self, file: bytes, output_format: OutputFormat, parameters: Parameters | None) -> bytes:
        """The same picture with a manifest.

        Args:
            file: the picture, with its words inside already: whatever changes afterwards makes the manifest invalid.
            output_format: the file's format.
            parameters: what the manifest says.

        Raises:
            ServeError: it cannot be signed, for instance as no time-stamping authority answers.
        """
        import c2pa

        source, signed = io.BytesIO(file), io.BytesIO()
        try:
            with (
                c2pa.Context(c2pa.Settings.from_dict(_SETTINGS)) as context,
                c2pa.Signer.from_callback(self._sign, self._algorithm, self._chain, self._timestamp_url) as signer,
                c2pa.Builder(json.dumps(_manifest(parameters)), context) as builder,
            ):
                builder.sign(signer, f"image/{output_format}", source, signed)
        except c2pa.C2paError as error:
            raise ServeError("The picture cannot be signed.", rule=str(error)) from error
        return signed.getvalue()


def read_credentials(file: bytes, kind: str, anchors: str | None = None) -> Credentials:
    """What the manifest inside a file says, and whether that is so.

    Args:
        file: the picture's bytes; a stranger's are safe.
        kind: ``PNG``, ``JPEG``, ``WEBP`` or ``GIF``, as Pillow names it.
        anchors: certificates in PEM; a manifest whose signer leads to one of them is trusted.
    """
    import c2pa

    settings: dict[str, Any] = {**_SETTINGS, **({"trust": {"user_anchors": anchors}} if anchors else {})}
    try:
        with (
            c2pa.Context(c2pa.Settings.from_dict(settings)) as context,
            c2pa.Reader(f"image/{kind.lower()}", io.BytesIO(file), context=context) as reader,
        ):
            store = json.loads(reader.json())
    except c2pa.C2paError as error:
        return _without_manifest(str(error))
    manifest = store["manifests"][store["active_manifest"]]
    problems = tuple(sorted({str(status["code"]) for status in store.get("validation_status", ())}))
    signature = manifest.get("signature_info", {})
    generators = manifest.get("claim_generator_info", [{}])
    said = [part["data"] for part in manifest.get("assertions", ()) if part["label"].startswith(ASSERTION)]
    names = [signature[key] for key in ("issuer", "common_name") if signature.get(key)]
    return Credentials(
        state=_STATES.get(str(store.get("validation_state")), "invalid"),
        signer=", ".join(names) or None,
        issued=signature.get("time"),
        generator=" ".join(str(generators[0][key]) for key in ("name", "version") if generators[0].get(key)) or None,
        picture=said[0] if said else {},
        problems=problems,
    )


_STATES: dict[str, State] = {"Trusted": "trusted", "Valid": "valid", "Invalid": "invalid"}


def _without_manifest(error: str) -> Credentials:
    """Nothing there, or something that is no manifest."""
    if error.startswith(("ManifestNotFound", "NotSupported")):
        return Credentials("absent")
    kind = re.match(r"\w+", error)
    return Credentials("invalid", problems=(kind[0] if kind else "unreadable",))


def _manifest(parameters: Parameters | None) -> dict[str, Any]:
    name, number = software().split(", ")[0].split(" ")
    told = {} if parameters is None else parameters.model_dump(mode="json", exclude=_PRIVATE, exclude_none=True)
    action = {
        "action": "c2pa.created",
        "digitalSourceType": _SOURCE_TYPE,
        "softwareAgent": {"name": name, "version": number},
        "description": f"Made by the model {told['model']}." if told else "A trial.",
    }
    return {
        "claim_generator_info": [{"name": name, "version": number}],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
            {"label": ASSERTION, "data": told},
        ],
    }


def read_anchors(config: ProvenanceConfig) -> str | None:
    """The certificates that a verifier trusts, in PEM; None where the config names none.

    Raises:
        ConfigError: they cannot be read.
    """
    if config.trust_anchors is None:
        return None
    return _read(config.trust_anchors, "trust anchor").decode("ascii", errors="replace")


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise _refused(what, path, error.strerror or type(error).__name__) from error


def _signing(config: CredentialsConfig, chain: bytes) -> Callable[[bytes], bytes]:
    """What signs bytes with the key.

    Raises:
        ConfigError: no such key, or not the certificate's.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

    try:
        key = serialization.load_pem_private_key(_read(config.key, "key"), password=None)
        certificate = x509.load_pem_x509_certificates(chain)[0]
    except (ValueError, TypeError, IndexError) as error:
        rule = "PEM files: the certificate and its issuers, and an unencrypted private key"
        raise _refused("certificate and key", config.certificate, rule) from error
    if key.public_key() != certificate.public_key():
        raise _refused("key", config.key, f"the private key of {config.certificate}")
    if isinstance(key, ec.EllipticCurvePrivateKey) and config.algorithm in {"es256", "es384"}:
        curve = ec.ECDSA(hashes.SHA256() if config.algorithm == "es256" else hashes.SHA384())
        return lambda data: key.sign(data, curve)
    if isinstance(key, rsa.RSAPrivateKey) and config.algorithm == "ps256":
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
        return lambda data: key.sign(data, pss, hashes.SHA256())
    if isinstance(key, ed25519.Ed25519PrivateKey) and config.algorithm == "ed25519":
        return key.sign
    raise _refused("key", config.key, f"a key that signs by {config.algorithm}")


def _refused(what: str, path: str, rule: str) -> ConfigError:
    return ConfigError(
        f"The signing {what} cannot be used.",
        value=path,
        rule=rule,
        mend="darkroom credentials --out FOLDER makes a pair for trials",
    )


def _probe() -> bytes:
    """A picture to try the pair on before anybody waits for one."""
    return encode_image(Image.new("RGB", (8, 8)), "png")
