"""Certificates: who is who on the wire, and a small authority for tests, demos and small collaborations.

A hospital's certificate names it in its URI SAN, `spiffe://<trust-domain>/hospital/<name>` (SPIFFE ID:
https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md), the aggregator's is `spiffe://<trust-domain>/aggregator`
and carries the DNS names and addresses that agents dial. Hospitals' certificates are for clients only and have no
DNS name, so none of them can pose as the aggregator. Production brings its own authority.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from datavector.errors import CertificateError, UsageError
from datavector.files import atomic_write

TRUST_DOMAIN = "datavector.local"
AGGREGATOR = "aggregator"
AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 365

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_TRUST_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9._-]{0,253}[a-z0-9])?")
_BACKDATE = timedelta(minutes=5)  # the other side's clock may be behind


@dataclass(frozen=True)
class Identity:
    """Whom a certificate speaks for.

    Attributes:
        hospital: its name, or None for the aggregator.
    """

    trust_domain: str
    hospital: str | None

    @property
    def uri(self) -> str:
        return f"spiffe://{self.trust_domain}/" + (f"hospital/{self.hospital}" if self.hospital else AGGREGATOR)


@dataclass(frozen=True)
class CertificateReport:
    """A certificate that can be used now."""

    identity: Identity
    not_after: datetime
    fingerprint: str

    @property
    def hospital(self) -> str | None:
        return self.identity.hospital

    def days_left(self, now: datetime | None = None) -> int:
        return math.floor((self.not_after - (now or datetime.now(UTC))) / timedelta(days=1))


@dataclass(frozen=True)
class Credentials:
    """What one side of mutual TLS shows and trusts, in PEM, as it was read at one moment and can be used now."""

    certificate: bytes
    key: bytes
    ca: bytes
    report: CertificateReport


# --- The authority --------------------------------------------------------------------------------------------


def init_authority(folder: Path, *, trust_domain: str = TRUST_DOMAIN, days: int = AUTHORITY_DAYS) -> Path:
    """Makes an authority in `folder`: `ca.crt`, and `ca.key` with mode 0600 (ECDSA P-256).

    Returns:
        The authority's certificate.

    Raises:
        UsageError: there is an authority already, or the trust domain is not a valid one.
    """
    if not _TRUST_DOMAIN.fullmatch(trust_domain):
        raise UsageError(f"{trust_domain!r} is no trust domain", remedy="use lower-case letters, digits, dots, dashes")
    if (folder / "ca.key").exists() or (folder / "ca.crt").exists():
        raise UsageError(f"{folder} has an authority already", remedy="issue from it, or give another folder")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"DataVector authority of {trust_domain}")])
    builder = (
        _builder(name, key.public_key(), days)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return _write(folder / "ca.crt", builder.sign(key, hashes.SHA256()), key)


def issue_hospital(folder: Path, hospital: str, *, days: float = CERTIFICATE_DAYS) -> Path:
    """Issues a hospital's certificate from the authority in `folder`: `<hospital>.crt`, and `.key` with mode 0600.

    Args:
        days: how long it is valid; negative for one that has expired.

    Returns:
        The certificate's path.

    Raises:
        UsageError: the name is not valid.
        CertificateError: the authority is missing or unreadable.
    """
    if not _NAME.fullmatch(hospital) or hospital in ("ca", AGGREGATOR):
        raise UsageError(
            f"{hospital!r} is no hospital's name", remedy="use up to 63 lower-case letters, digits and inner dashes"
        )
    return _issue(folder, hospital, (), days)


def issue_aggregator(folder: Path, *, server_names: Sequence[str], days: float = CERTIFICATE_DAYS) -> Path:
    """Issues the aggregator's certificate from the authority in `folder`: `aggregator.crt`, `aggregator.key`.

    Args:
        server_names: DNS names and IP addresses at which agents dial it.
        days: as in `issue_hospital`.

    Returns:
        The certificate's path.

    Raises:
        UsageError: a name is neither a DNS name nor an address.
        CertificateError: the authority is missing or unreadable.
    """
    return _issue(folder, None, server_names, days)


def server_names(certificate: Path) -> list[str]:
    """The DNS names and addresses in an aggregator's certificate, so that the next one has the same.

    Raises:
        CertificateError: it is missing or unreadable.
    """
    names = _load(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *(str(address) for address in addresses)]


def demand_server_names(names: Sequence[str]) -> None:
    """Raises UsageError for the first that is neither a DNS name nor an address."""
    for name in names:
        _server_name(name)


def _issue(folder: Path, hospital: str | None, server_names: Sequence[str], days: float) -> Path:
    authority, authority_key = _load(folder / "ca.crt"), _load_key(folder / "ca.key")
    identity = Identity(_authority_domain(folder / "ca.crt", authority), hospital)
    key = ec.generate_private_key(ec.SECP256R1())
    usage = ExtendedKeyUsageOID.CLIENT_AUTH if hospital else ExtendedKeyUsageOID.SERVER_AUTH
    names = [x509.UniformResourceIdentifier(identity.uri), *(_server_name(name) for name in server_names)]
    stem = hospital or AGGREGATOR
    builder = (
        _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, stem)]), key.public_key(), days)
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),  # type: ignore[arg-type]
            critical=False,
        )
    )
    return _write(folder / f"{stem}.crt", builder.sign(authority_key, hashes.SHA256()), key)


# --- Reading and checking -------------------------------------------------------------------------------------


def read_report(certificate: bytes) -> CertificateReport:
    """Identity, end of validity and SHA-256 fingerprint (64 hexadecimal digits) of a certificate (PEM).

    Raises:
        CertificateError: it is unreadable, or does not have exactly one SPIFFE ID of a hospital or an aggregator.
    """
    return _report(_parse(certificate, "the certificate"))


def check_certificate(certificate: Path, key: Path, ca: Path, *, now: datetime | None = None) -> CertificateReport:
    """Checks on this side what the other side will check: dates, issuer, key, identity.

    Raises:
        CertificateError: a file is missing or unreadable, the certificate is expired, not yet valid, of another
            authority or names nobody, or the key is another one's.
    """
    return read_credentials(certificate, key, ca, now=now).report


def read_credentials(certificate: Path, key: Path, ca: Path, *, now: datetime | None = None) -> Credentials:
    """Reads each file once, and checks what was read as `check_certificate` does.

    Raises:
        CertificateError: as there.
    """
    now = now or datetime.now(UTC)
    content = {path: _read(path) for path in (certificate, key, ca)}
    chain, authorities = (_parse_all(content[path], path) for path in (certificate, ca))
    leaf, private = chain[0], _parse_key(content[key], key)
    if now < leaf.not_valid_before_utc:
        raise CertificateError(
            f"{certificate} is valid only from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M}Z on",
            remedy="check this machine's clock, or wait",
        )
    if now >= leaf.not_valid_after_utc:
        raise CertificateError(
            f"{certificate} expired on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M}Z",
            remedy="ask the aggregation site for a new certificate",
        )
    if _public_bytes(private.public_key()) != _public_bytes(leaf.public_key()):
        raise CertificateError(f"{key} is not the key of {certificate}", remedy="give the key that belongs to it")
    if not any(_issued_by(link, authority) for link in chain for authority in authorities):
        raise CertificateError(
            f"{certificate} was issued by {leaf.issuer.rfc4514_string()!r}, which is not the authority in {ca}",
            remedy="give the authority file that came with the certificate, or ask for a certificate of this authority",
        )
    return Credentials(content[certificate], content[key], content[ca], _report(leaf))


def _report(leaf: x509.Certificate) -> CertificateReport:
    return CertificateReport(_identity(leaf), leaf.not_valid_after_utc, leaf.fingerprint(hashes.SHA256()).hex())


def _identity(leaf: x509.Certificate) -> Identity:
    uris = _uris(leaf)
    if len(uris) == 1:
        uri = urlsplit(uris[0])
        kind, _, name = uri.path.removeprefix("/").partition("/")
        if uri.scheme == "spiffe" and _TRUST_DOMAIN.fullmatch(uri.netloc) and not uri.query and not uri.fragment:
            if kind == "hospital" and _NAME.fullmatch(name):
                return Identity(uri.netloc, name)
            if uri.path == f"/{AGGREGATOR}":
                return Identity(uri.netloc, None)
    raise CertificateError(
        f"the certificate names {uris or 'nobody'} in its URI SAN",
        remedy="use one with exactly one URI, spiffe://<trust-domain>/hospital/<name>",
    )


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _issued_by(leaf: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _authority_domain(path: Path, authority: x509.Certificate) -> str:
    for uri in _uris(authority):
        if uri.startswith("spiffe://"):
            return urlsplit(uri).netloc
    raise CertificateError(
        f"{path} names no trust domain", remedy="make the authority with `datavector certs init`, or issue elsewhere"
    )


# --- Files ----------------------------------------------------------------------------------------------------


def _load(path: Path) -> x509.Certificate:
    return _parse_all(_read(path), path)[0]


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    return _parse_key(_read(path), path)


def _parse_all(content: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise _unreadable(path, "certificate") from error


def _parse_key(content: bytes, path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        raise _unreadable(path, "private key") from error
    return key  # type: ignore[return-value]  # an RSA or Ed25519 key of another authority serves as well


def _parse(certificate: bytes, name: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(certificate)
    except ValueError as error:
        raise CertificateError(f"{name} is unreadable", remedy="use an X.509 certificate in PEM") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(
            f"{path} cannot be read ({error.strerror})", remedy="check the path and the file's permissions"
        ) from error


def _unreadable(path: Path, kind: str) -> CertificateError:
    return CertificateError(f"{path} holds no readable {kind}", remedy="give a PEM file, without a passphrase")


def _write(path: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Path:
    """Writes a certificate, and its key beside it."""
    with atomic_write(path.with_suffix(".key"), mode=0o600) as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with atomic_write(path) as file:
        file.write(certificate.public_bytes(Encoding.PEM))
    return path


# --- Parts of certificates ------------------------------------------------------------------------------------


def _builder(subject: x509.Name, public: ec.EllipticCurvePublicKey, days: float) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    begin = min(now, now + timedelta(days=days)) - _BACKDATE
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public)
        .serial_number(int.from_bytes(os.urandom(16)) >> 1)
        .not_valid_before(begin)
        .not_valid_after(now + timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _server_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise UsageError(
            f"{name!r} is neither a DNS name nor an address",
            remedy="give e.g. --server-name host.example, in its ASCII form (xn--...) where it has other letters",
        ) from error


def _public_bytes(key: object) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined, no-any-return]
