"""Commands that a command types, without the seconds that an interpreter takes to import torch and nnU-Net.

A folder of scripts stands in for the environment's. Each of them is a process of its own, as it would be, and passes
on what it was called with to a server that has all imports done; that forks a process, which runs the command.
"""

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from no_network import sitecustomize

from nnunet_vit_mae.processes.signals import end_with_parent

PREFIXES = ("mae3d", "nnUNetv2_")
IMPORTED = [
    *("nnunetv2.run.run_training", "nnunetv2.inference.predict_from_raw_data", "nnunetv2.ensembling.ensemble"),
    "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints",
    *("nnunet_vit_mae.nnunet.trainers", "nnunet_vit_mae.nnunet.pretraining", "nnunet_vit_mae.nnunet.calibration"),
    *("nnunet_vit_mae.nnunet.planner", "nnunet_vit_mae.nnunet.encoders", "nnunet_vit_mae.study.report"),
    *("nnunet_vit_mae.evaluation.report", "nnunet_vit_mae.evaluation.summary"),
]
SCRIPT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([[{name!r}, *sys.argv[1:]], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [1, 2])
    server.sendall(request)
    sys.exit(int.from_bytes(server.recv(1) or b"\\1", "big"))
"""
_serving: list[Path] = []  # the folder, in the server and the processes that it forks


@functools.cache
def forked_scripts() -> Path:
    """Return the folder of scripts. The first call starts the server, which ends with this process."""
    if _serving:
        return _serving[0]
    folder = Path(tempfile.mkdtemp(prefix="mae3d"))  # the address of a socket must be short
    address = str(folder / "server")
    for script in entry_points(group="console_scripts"):
        if script.name.startswith(PREFIXES):
            file = folder / script.name
            file.write_text(SCRIPT.format(python=sys.executable, address=address, name=script.name))
            file.chmod(0o755)
    paths = [str(Path(sitecustomize.__file__).parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    server = subprocess.Popen(
        [sys.executable, "-P", "-c", "import sys, forked_commands as here; here.serve(sys.argv[1])", address],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl+C is for the tests
    )
    atexit.register(_end, server, folder)
    assert server.stdout
    with server.stdout as output:
        assert output.readline() == b"ready\n"
    return folder


def _end(server: subprocess.Popen[bytes], folder: Path) -> None:
    server.kill()
    server.wait()
    shutil.rmtree(folder)


def serve(address: str) -> None:
    """Fork a process for every script that asks for one."""
    from in_process import run_in_process  # which takes the scripts of this module

    end_with_parent()
    _serving.append(Path(address).parent)
    for module in IMPORTED:
        import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                connection.send(bytes([_run(connection, run_in_process)]))
                sys.exit()  # as an interpreter ends, for multiprocessing tidies up then
            connection.close()


def _run(connection: socket.socket, run_in_process: Callable[..., subprocess.CompletedProcess[str]]) -> int:
    size, streams, *_ = socket.recv_fds(connection, 8, 2)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += connection.recv(2**16)
    command, folder, environment = json.loads(request)
    os.chdir(folder)
    for stream, number in zip(streams, (1, 2), strict=True):
        os.dup2(stream, number)
    done = run_in_process(command, environment)
    for text, stream in ((done.stdout, sys.stdout), (done.stderr, sys.stderr)):
        stream.write(text)
        stream.flush()
    return done.returncode
