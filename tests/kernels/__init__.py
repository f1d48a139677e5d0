"""Each distribution's own kernel, Python, bcc and QEMU, in an emulated machine."""
