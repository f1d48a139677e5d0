"""A client for QEMU's NBD server, just enough to put single requests into a chosen AioContext.

Knows: the old-style end of the fixed newstyle handshake and the simple requests of the NBD protocol.
The monitor's `qemu-io` cannot stand in for it: since QEMU's multi-queue block layer its requests run
in the main loop whatever iothread the drive has, and its flush and discard block the monitor.

The connection stays open as long as QEMU lives: QEMU 7.2 aborts when a client of an export in an
iothread leaves ("nbd_blockdev_client_closed: Assertion `qemu_in_main_thread()'").
"""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path

from tracer.errors import LabError

OPTION_MAGIC = b"IHAVEOPT"
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698
FIXED_NEWSTYLE_NO_ZEROES = 3
EXPORT_NAME = 1
STRUCTURED_REPLY = 8
KINDS = {"read": 0, "write": 1, "flush": 3, "discard": 4, "unknown": 0x7F}


class NbdClient:
    """One connection to one export; requests may be sent ahead of their replies, QEMU takes up to 16.

    A `sparse` one has holes told apart: before each read QEMU asks the file where data is, by lseek(2) in
    the thread that serves the export. Its replies are of another form and cannot be waited for.
    """

    def __init__(self, path: Path, export: str, timeout: float = 30.0, sparse: bool = False) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        self._socket.connect(str(path))
        self._handle = 0
        self._reads: dict[int, int] = {}
        self._finished: dict[int, int] = {}
        self._negotiate(export, sparse)

    def _negotiate(self, export: str, sparse: bool) -> None:
        self._receive(18)
        self._socket.sendall(struct.pack(">I", FIXED_NEWSTYLE_NO_ZEROES))
        if sparse:
            self._option(STRUCTURED_REPLY)
            self._receive(20)  # acknowledged
        self._option(EXPORT_NAME, export.encode())
        self._receive(10)  # size and flags

    def _option(self, number: int, data: bytes = b"") -> None:
        self._socket.sendall(OPTION_MAGIC + struct.pack(">II", number, len(data)) + data)

    def submit(self, kind: str, offset: int = 0, size: int = 4096) -> int:
        """Send one request and return its handle without waiting for the reply.

        "unknown" is one that the server refuses at once: it wakes the loop and does nothing.
        """
        self._handle += 1
        data = bytes([self._handle & 0xFF]) * size if kind == "write" else b""
        if kind in ("flush", "unknown"):
            offset = size = 0
        elif kind == "read":
            self._reads[self._handle] = size
        self._socket.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, KINDS[kind], self._handle, offset, size) + data)
        return self._handle

    def wait(self, handle: int) -> int:
        """Wait for that request's reply and return its errno (0: success); TimeoutError if it stays out."""
        while handle not in self._finished:
            magic, error, finished = struct.unpack(">IIQ", self._receive(16))
            if magic != REPLY_MAGIC:
                raise LabError(f"NBD reply begins with {magic:#x}")
            if size := self._reads.pop(finished, 0):
                self._receive(0 if error else size)
            self._finished[finished] = error
        return self._finished.pop(handle)

    def discard_replies(self) -> None:
        """Throw away what has come so far; no request of this client can be waited for after that.

        QEMU takes no more requests from a client that lets some 250 replies lie.
        """
        timeout = self._socket.gettimeout()
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(65536):
                pass
        self._socket.settimeout(timeout)

    def close(self) -> None:
        """Leave; only once QEMU is gone."""
        self._socket.close()

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise LabError("the NBD server closed the connection")
            data += part
        return bytes(data)
