"""A proxy with a certificate before a plain HTTP server, whose connections a test can cut; and the certificates."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Certificates:
    """Files of an authority of our own and of a certificate that it gave to this machine."""

    authority: Path
    certificate: Path
    key: Path


def make_certificates(folder: Path, *, address: str) -> Certificates:
    """New ones, valid for a day.

    Args:
        folder: that they are written to.
        address: by which this machine is reached, beside 127.0.0.1.
    """
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lowtide tests")])
    node = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)

    def issue(
        subject: x509.Name, public: ec.EllipticCurvePublicKey, *, is_authority: bool
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(public),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
        )
        if is_authority:
            usage = x509.KeyUsage(
                True, False, False, False, False, key_cert_sign=True, crl_sign=True, encipher_only=False,
                decipher_only=False,
            )  # fmt: skip
            builder = builder.add_extension(usage, critical=True)
        else:
            names = [x509.IPAddress(ipaddress.ip_address(place)) for place in {"127.0.0.1", address}]
            builder = builder.add_extension(
                x509.SubjectAlternativeName([*names, x509.DNSName("localhost")]), critical=False
            )
        return builder.sign(authority_key, hashes.SHA256())

    found = Certificates(folder / "ca.crt", folder / "node.crt", folder / "node.key")
    pem = serialization.Encoding.PEM
    found.authority.write_bytes(issue(name, authority_key.public_key(), is_authority=True).public_bytes(pem))
    found.certificate.write_bytes(issue(node, key.public_key(), is_authority=False).public_bytes(pem))
    found.key.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return found


class Proxy:
    """Passes bytes on, and can cut every connection and refuse new ones for a while."""

    def __init__(self, target: tuple[str, int], certificates: Certificates) -> None:
        self._target = target
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificates.certificate, certificates.key)
        self._open: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self._loop = asyncio.new_event_loop()
        self.port = 0

    def cut(self, *, for_s: float) -> None:
        """Cut what is open, and everything new for so long."""

        def act() -> None:
            self._is_cut = True
            for writer in self._open:
                writer.transport.abort()
            self._loop.call_later(for_s, setattr, self, "_is_cut", False)

        self._loop.call_soon_threadsafe(act)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection(*self._target)
        both = {writer, there_writer}
        self._open |= both
        with contextlib.suppress(OSError):
            await asyncio.gather(_pump(reader, there_writer), _pump(there_reader, writer))
        self._open -= both

    def run(self, ready: threading.Event) -> None:
        """Serve until stopped."""
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        )
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.1))
        self._loop.close()

    def stop(self) -> None:
        """End `run`."""
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


@contextlib.contextmanager
def tls_proxy(target: tuple[str, int], certificates: Certificates) -> Iterator[Proxy]:
    """A proxy before `target` for the time of the block."""
    proxy, ready = Proxy(target, certificates), threading.Event()
    thread = threading.Thread(target=proxy.run, args=(ready,), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join(10)
