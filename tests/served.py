"""A server of ours in a thread of this process, and plain clients of it."""

import contextlib
import http.client
import json
import socket
import threading
import time

from vit22b_transfer.serving import limits, server

BOUNDARY = "a-boundary-of-tests"


@contextlib.contextmanager
def serving(app, bounds=None):
    """The port of a server of an `App`, which has ended behind the context."""
    bound = server.bound_socket("127.0.0.1", 0)
    served = server.make(app, bounds or limits.Limits())
    thread = threading.Thread(target=served.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        wait_for(lambda: served.started)
        yield bound.getsockname()[1]
    finally:
        served.should_exit = True
        thread.join(30)
        bound.close()
        assert not thread.is_alive()


def wait_for(true):
    """Returns when `true()` is; a server that hangs is a failure after 30 s."""
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("what was waited for did not come")


def form(**fields):
    """(headers, body) of a multipart form: bytes are files, texts are texts."""
    parts = []
    for name, value in fields.items():
        file = '; filename="any.jpg"' if isinstance(value, bytes) else ""
        value = value if isinstance(value, bytes) else value.encode()
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}'
        parts.append(head.encode() + b"\r\n\r\n" + value + b"\r\n")
    body = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    return {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}, body


def ask(port, path, body=None, headers=None, method=None):
    """(status, headers, JSON or text) of one request."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(client):
        method = method or ("GET" if body is None else "POST")
        client.request(method, path, body, headers or {})
        response = client.getresponse()
        text = response.read()
        if response.headers.get_content_type() == "application/json":
            return response.status, response.headers, json.loads(text)
        return response.status, response.headers, text.decode()


def caption(port, image, **fields):
    """The answer to an image."""
    headers, body = form(image=image, **fields)
    return ask(port, "/v1/caption", body, headers)


def request(path, headers, body, **other):
    """The bytes of a POST."""
    head = {"Host": "localhost", "Content-Length": len(body)} | headers | other
    lines = [f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in head.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def raw(port, content, *, read=True):
    """What comes back for bytes on a socket, which is closed; b"" without `read`."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(content)
        answer = b""
        while read and (part := client.recv(65536)):
            answer += part
        return answer
