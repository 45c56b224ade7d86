"""Fixtures that the tests share: data that may not be there, a local server, a disk that is full."""
import http.server
import multiprocessing
import os
import signal
import subprocess
import threading
import time

import pytest
import torch

from robustint.core import data_root
from robustint.data import FILES, load_dataset

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data():
    """Call `data(name, split)` for a data set; the test is skipped, with the reason, where it is not there."""
    loaded = {}

    def load(name, split="test"):
        try:
            if (name, split) not in loaded:
                loaded[name, split] = load_dataset(name, split)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        return loaded[name, split]

    return load


@pytest.fixture(scope="session")
def released():
    """The folder of the authors' released networks; the test is skipped where one is missing."""
    missing = [file for file in FILES["released"] if not (data_root() / file).is_file()]
    if missing:
        pytest.skip(f"no {missing[0]} under {data_root()}: run `robustint fetch released`")
    return data_root() / "reference_networks"


class Server:
    """Serves files out of a dictionary, and fails on request.

    files: content by name; cut: send at most so many bytes an answer; end: send no byte from here on; ranges: whether to answer 206;
    stall: wait before the end of an answer; reset: close the connection hard after the cut; status: answer this only."""

    def __init__(self):
        self.files, self.cut, self.end, self.ranges, self.stall, self.reset, self.status = {}, None, None, True, 0.0, False, None
        self.asked = []  # (name, first byte) of every request
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *words):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler):
        name = handler.path.rsplit("/", 1)[-1]
        content = self.files.get(name)
        first = int(handler.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        self.asked.append((name, first))
        if self.status or content is None:
            return handler.send_error(self.status or 404)
        if not self.ranges:
            first = 0
        if first and first >= len(content):
            return handler.send_error(416)
        handler.send_response(206 if first else 200)
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(content) - first))
        handler.end_headers()
        end = min(limit for limit in (len(content), self.end, None if self.cut is None else first + self.cut) if limit is not None)
        try:
            handler.wfile.write(content[first:end])
            handler.wfile.flush()
            time.sleep(self.stall)
            if self.reset:
                handler.connection.setsockopt(*_LINGER)
                handler.connection.close()
        except OSError:
            pass  # the client went away

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def _linger():
    import socket
    import struct

    return socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)


_LINGER = _linger()


@pytest.fixture
def server():
    """A local server that can cut, corrupt, stall and refuse."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 64 KiB; skipped where this user may not mount one."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this user cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def kill_after():
    """Call `kill_after(seconds, function, *arguments)`: run a function in a process of its own and kill it with SIGKILL."""
    fork = multiprocessing.get_context("fork")

    def run(seconds, function, *arguments):
        process = fork.Process(target=function, args=arguments)
        process.start()
        process.join(seconds)
        alive = process.is_alive()
        if alive:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        return alive

    return run


def one_line(error):
    """The message of an error, which must be one line."""
    message = str(error.value)
    assert message and "\n" not in message, message
    return message
