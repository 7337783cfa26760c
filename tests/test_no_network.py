"""Commands of the tests reach no other machine: every `Workspace` has them watched, the whole end-to-end path too."""

import socket
import subprocess
import sys

import pytest
from conftest import Workspace

# RFC 5737 and RFC 2606 reserve these: nobody answers
ATTEMPTS = """
import socket
for attempt in (
    lambda: socket.create_connection(("192.0.2.1", 9), timeout=1),
    lambda: socket.getaddrinfo("mae3d.invalid", 443),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9)),
):
    try:
        attempt()
    except OSError as error:
        print(error)
"""
LOCAL = """
import multiprocessing, socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
socket.create_connection(("localhost", server.getsockname()[1])).close()
with multiprocessing.Manager() as manager:
    assert list(manager.list([1])) == [1]
"""


def run(workspace, script):
    return subprocess.run(
        [sys.executable, "-c", script],
        env=workspace.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def test_an_attempt_to_leave_this_machine_fails_and_is_noted(tmp_path):
    workspace = Workspace(tmp_path)
    printed = run(workspace, ATTEMPTS)
    assert printed.count("tests do not leave this machine") == 3
    noted = workspace.connections.read_text()
    assert noted.count("192.0.2.1") == 2
    assert noted.count("mae3d.invalid") == 1
    with pytest.raises(AssertionError, match=r"mae3d\.invalid"):
        workspace.call("mae3d_trainers")


def test_sockets_of_this_machine_work(tmp_path):
    workspace = Workspace(tmp_path)
    run(workspace, LOCAL)
    assert not workspace.connections.exists()


def test_commands_in_this_process_are_watched_too():
    with pytest.raises(PermissionError, match="do not leave this machine"):
        socket.create_connection(("192.0.2.1", 9), timeout=1)
