"""Throw-away QEMUs, and faults that can be put into them and taken out again.

Used by `aio-trace demo` and by the tests. Everything here acts on processes that this very lab
started, and refuses any other.
"""
