"""aio-trace: times QEMU's thread-pool requests and says why one hangs."""

__version__ = "0.1.0"
