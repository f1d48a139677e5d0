"""Compile the probe programs: the one place that knows bcc, run as a script of its own.

bcc is seen by the distribution's own Python only, whichever runs the rest: so this is plain enough for
Python 3.6 and imports nothing of ours. Knows: what of a compilation is worth telling, the maps' shapes and the
instructions, in which a map still has the descriptor that it had here.

    PYTHON -I compile.py version     prints the version of the bcc that this Python would import
    PYTHON -I compile.py import      imports it
    PYTHON -I compile.py compile     reads a job as JSON from standard input, writes the outcome as JSON

Exit status 3: there is no bcc that could be imported, and standard error says why.
"""

import base64
import ctypes as ct
import json
import os
import re
import resource
import sys
from importlib.machinery import PathFinder
from typing import Any, Dict, List, Optional

BCC_MISSING = 3
UNKNOWN = "unknown"


def bcc_version() -> Optional[str]:
    """The version of the bcc package that this Python would import, without importing it; None if there is none."""
    try:
        spec = PathFinder.find_spec("bcc", sys.path)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:  # a folder of that name without code is none
        return None
    try:
        path = os.path.join(os.path.dirname(spec.origin), "version.py")
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return UNKNOWN
    found = re.search(r"""__version__\s*=\s*['"]([^'"]+)""", text)
    return found.group(1) if found else UNKNOWN


def _imported() -> Any:
    try:
        import bcc
    except (ImportError, OSError) as error:
        _end(error, BCC_MISSING)
    return bcc


def _end(reason: object, status: int) -> None:
    print(reason, file=sys.stderr)
    sys.exit(status)


def _compiled(job: Dict[str, Any]) -> Dict[str, Any]:
    bcc = _imported()
    try:
        module = bcc.BPF(src_file=os.fsencode(job["source"]), cflags=job["flags"])
    except Exception as error:  # bcc raises bare Exception
        _end(error, 1)
    return _outcome(bcc.libbcc.lib, module.module, job["programs"])


def _outcome(library: Any, module: Any, programs: List[str]) -> Dict[str, Any]:
    # Not all of these are declared by each bcc, and what is not declared gets the lower half of the module's address:
    # enough where Python is not position independent (Debian), and fatal where it is (RHEL).
    library.bpf_num_tables.argtypes = [ct.c_void_p]
    library.bpf_table_name.restype = ct.c_char_p
    for name in ("name", "fd_id", "type_id", "key_size_id", "leaf_size_id", "max_entries_id", "flags_id"):
        getattr(library, "bpf_table_" + name).argtypes = [ct.c_void_p, ct.c_size_t]
    library.bpf_function_start.restype = ct.c_void_p
    for name in ("start", "size"):
        getattr(library, "bpf_function_" + name).argtypes = [ct.c_void_p, ct.c_char_p]
    numbers = range(library.bpf_num_tables(module))
    return {
        "maps": [_shape(library, module, number) for number in numbers],
        "descriptors": [library.bpf_table_fd_id(module, number) for number in numbers],
        "programs": {name: _code(library, module, name) for name in programs},
    }


def _shape(library: Any, module: Any, number: int) -> List[Any]:
    return [
        library.bpf_table_name(module, number).decode(),
        library.bpf_table_type_id(module, number),
        library.bpf_table_key_size_id(module, number),
        library.bpf_table_leaf_size_id(module, number),
        library.bpf_table_max_entries_id(module, number),
        library.bpf_table_flags_id(module, number),
    ]


def _code(library: Any, module: Any, name: str) -> str:
    start = library.bpf_function_start(module, name.encode())
    return base64.b64encode(ct.string_at(start, library.bpf_function_size(module, name.encode()))).decode()


def _go_first() -> None:
    """Where memory runs out, the kernel is to end this process and no other."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass


def main() -> None:
    """One task. What bcc, clang or a library prints goes to standard error."""
    # LLVM aborts where it lacks an instruction; that is told and needs no core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _go_first()
    task = sys.argv[1]
    if task == "version":
        version = bcc_version()
        if version is None:
            _end("no module named bcc", BCC_MISSING)
        out.write(str(version).encode())
    elif task == "import":
        _imported()
    else:
        out.write(json.dumps(_compiled(json.loads(sys.stdin.buffer.read().decode()))).encode())
    out.flush()
    # The module's own clean-up at the end is of no use to a process that ends.
    os._exit(0)


if __name__ == "__main__":
    main()
