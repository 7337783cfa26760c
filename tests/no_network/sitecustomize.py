"""No connection leaves this machine: Python imports this module at its start where the folder is on its path.

An attempt fails, and is noted in the file that CONNECTIONS names, for whoever makes it may catch the error.
"""

import os
import socket
import sys

CONNECTIONS = "MAE3D_TEST_CONNECTIONS"
PLACE_OF_HOST = {  # among the arguments of Python's audit events
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}


def is_local(address: object) -> bool:
    """Whether a host, an address with its port, or the path of a Unix socket is on this machine."""
    host = address[0] if isinstance(address, tuple) and address else address
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if host is None or not isinstance(host, str):
        return True
    known = ("", "localhost", "::1", "0.0.0.0", socket.gethostname())
    is_path = not isinstance(address, tuple) and ("/" in host or host.startswith("\0"))
    return host in known or host.startswith("127.") or is_path


def forbid(event: str, arguments: tuple) -> None:
    if event in PLACE_OF_HOST and not is_local(address := arguments[PLACE_OF_HOST[event]]):
        if file := os.environ.get(CONNECTIONS):
            with open(file, "a", encoding="utf-8") as stream:  # noqa: PTH123 (at the start of every interpreter)
                stream.write(f"{event} {address} by {sys.argv}\n")
        raise PermissionError(f"tests do not leave this machine: {event} {address}")


sys.addaudithook(forbid)
