"""A certificate and a key for trials of signing; nobody outside trusts them."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from training.errors import UsageError

CERTIFICATE, KEY, ANCHOR = "certificate.pem", "key.pem", "anchor.pem"
"""The chain to sign with, its private key, and what a verifier is told to trust."""
_DAYS = 90
_ORGANISATION = "Darkroom trial"


def make_trial_pair(folder: Path) -> tuple[Path, Path, Path]:
    """Write an ES256 certificate with its issuer, its key (for the owner's eyes alone), and the issuer as an anchor.

    They follow the profile of C2PA 2.1, section 14.5.1: a certificate that signs claims is not its own issuer. The
    issuer's key is thrown away, so that nothing else can be signed in its name.

    Args:
        folder: where; made if missing.

    Returns:
        The certificate's, the key's and the anchor's file.

    Raises:
        UsageError: one of the files exists, or the folder cannot be written.
    """
    paths = folder / CERTIFICATE, folder / KEY, folder / ANCHOR
    if existing := [path.name for path in paths if path.exists()]:
        raise UsageError(
            "Nothing is overwritten.", value=str(folder), rule=f"a folder without {', '.join(existing)}", mend="--out"
        )
    issuer_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = _issuer(issuer_key)
    certificate = _certificate(key.public_key(), issuer, issuer_key)
    anchor = issuer.public_bytes(Encoding.PEM)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(paths[1], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
        paths[0].write_bytes(certificate.public_bytes(Encoding.PEM) + anchor)
        paths[2].write_bytes(anchor)
    except OSError as error:
        raise UsageError("The pair cannot be written.", value=str(folder), rule=error.strerror, mend="--out") from error
    return paths


def _issuer(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = _name("Darkroom trial issuer")
    return (
        _dated(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _certificate(
    key: ec.EllipticCurvePublicKey, issuer: x509.Certificate, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    issued_by = issuer_key.public_key()
    return (
        _dated(_name("Darkroom trial signer"), issuer.subject, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issued_by), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def _dated(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=_DAYS))
    )


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANISATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
