"""The fleet's own CA, and the certificates of its servers (X.509, P-256)."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kvplane.events.errors import BadCredentials

if TYPE_CHECKING:
    from collections.abc import Sequence

CA_DAYS = 3650
SERVER_DAYS = 825
"""Longest that some platforms accept."""
_EARLIER = timedelta(hours=1)
"""Clocks differ."""
_COMMON_NAME = 64


class Pair(NamedTuple):
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def new_ca(name: str) -> Pair:
    """A CA that may sign servers and nothing below it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _named(name)
    certificate = (
        _builder(subject, subject, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(certificate, key)


def new_server(ca: Pair, name: str, names: Sequence[str]) -> Pair:
    """A server's certificate for these host names and addresses; it also logs in at the other servers with it."""
    authority, signer = _loaded(ca)
    key = ec.generate_private_key(ec.SECP256R1())
    alternatives = x509.SubjectAlternativeName([_alternative(each) for each in names])
    certificate = (
        _builder(_named(name), authority.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(alternatives, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return _pem(certificate, key)


def until(certificate: bytes) -> datetime:
    """When a certificate ends to be valid. Raises `BadCredentials`."""
    return _certificate(certificate).not_valid_after_utc


def names_of(certificate: bytes) -> list[str]:
    """Host names and addresses that a certificate is for. Raises `BadCredentials`."""
    found = _certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]


def signed_by(certificate: bytes, ca: bytes) -> bool:
    """Whether the CA has signed this certificate. Raises `BadCredentials`."""
    try:
        _certificate(certificate).verify_directly_issued_by(_certificate(ca))
    except Exception:  # noqa: BLE001 - whatever is wrong with it, it is not ours
        return False
    return True


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise BadCredentials(f"a certificate of the auth folder can't be read ({error}); restore it") from None


def _loaded(ca: Pair) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        signer = serialization.load_pem_private_key(ca.key, password=None)
    except (ValueError, TypeError) as error:
        raise BadCredentials(f"ca.key of the auth folder can't be read ({error}); restore it") from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise BadCredentials("ca.key of the auth folder is not the key that `kvplane auth init` made; restore it")
    return _certificate(ca.certificate), signer


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:_COMMON_NAME])])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:  # fmt: skip
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise BadCredentials(f"{name[:80]!r} is no host name; write it in ASCII (punycode)") from None


def _pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )  # fmt: skip
