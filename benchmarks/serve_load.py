"""A server of `vit22b serve` under 64 clients at once, some of whom mean no good.

    python benchmarks/serve_load.py --seconds 60

A model of random parameters is served by a process of its own. Three clients in eight
caption photographs; the others, at most twice a second each, send half of a request and
wait, send 200 MiB, send no image, go before the answer, or show an image of 12 million
pixels. After half of the time the folder of its checkpoint vanishes. Checks that there
is no status of a server's fault but 503, that memory is bounded, and that it answers at
the end; prints latency, throughput and resident memory.
"""

import argparse
import collections
import contextlib
import http.client
import io
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time

import numpy as np
import PIL.Image

SLOW, LARGE, NO_IMAGE, GONE, HUGE = "slow", "200 MiB", "no image", "gone", "huge image"
GOOD = "good"
# Of a client, by its number modulo eight.
KINDS = [GOOD, SLOW, GOOD, LARGE, NO_IMAGE, GONE, GOOD, HUGE]
ALLOWED = {
    GOOD: {200, 503},
    SLOW: {408},
    LARGE: {413, None},  # None: the server hung up while more was being sent
    NO_IMAGE: {400, 503},
    GONE: {None},
    HUGE: {200, 503},
}
MIB = 1 << 20


def serve(folder, image_size, pipe):
    """The server; tells its port."""
    import jax

    from vit22b_transfer.data import converters, vocabularies
    from vit22b_transfer.host import progress
    from vit22b_transfer.inference import decoding, restored
    from vit22b_transfer.models import encoder_decoder, multimodal, t5, vit
    from vit22b_transfer.partitioning.rules import Partitioning
    from vit22b_transfer.serving import app, predictor, server

    size = (image_size, image_size)
    text = t5.T5Config(
        vocab_size=512,
        width=128,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        head_dim=32,
        mlp_dim=256,
        tied_logits=True,
    )
    vocabulary = vocabularies.load(vocabularies.BYTES)
    model = multimodal.ImageTextModel(
        encoder_decoder.ImageTextModule(
            vit.vit22b_config("Ti/16", image_size=size), text
        ),
        vocabulary,
        vocabulary,
        decode_fn=decoding.greedy,
        feature_converter_cls=converters.ImageTextFeatureConverter,
    )
    lengths = {"images": size, "inputs": 32, "targets": 16}
    mesh = Partitioning(data=1)
    shapes = {
        "encoder_input_images": (1, *size, 3),
        "encoder_input_tokens": (1, 32),
        "decoder_input_tokens": (1, 16),
    }
    params = jax.jit(lambda key: model.get_initial_variables(key, shapes)["params"])(
        jax.random.key(0)
    )
    served = predictor.Predictor(
        restored.RestoredModel(model, mesh, folder, params),
        lengths,
        ("caption en", "answer en {question}"),
        batch_size=16,
    )
    console = progress.console()
    served.compile(console)
    bound = server.bound_socket("127.0.0.1", 0)
    pipe.send(bound.getsockname()[1])
    server.run(app.App(served, queue=64, local=True), bound, console)


def photo(width, height, seed=0):
    """A JPEG of noise of low frequency."""
    small = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    packed = io.BytesIO()
    PIL.Image.fromarray(small).resize((width, height)).save(packed, "JPEG")
    return packed.getvalue()


def form(image):
    boundary = "load"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="x"'
    body = head.encode() + b"\r\n\r\n" + image + f"\r\n--{boundary}--\r\n".encode()
    return {"Content-Type": f"multipart/form-data; boundary={boundary}"}, body


def head_of(headers, length):
    lines = [f"{k}: {v}" for k, v in headers.items()]
    lines = ["POST /v1/caption HTTP/1.1", "Host: localhost", *lines]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def one(kind, port, images):
    """The status of a request of that kind, None without one."""
    headers, body = form(images[kind])
    if kind in (GOOD, NO_IMAGE, HUGE):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        with contextlib.closing(client):
            client.request("POST", "/v1/caption", body, headers)
            response = client.getresponse()
            response.read()
            if response.status == 503:
                time.sleep(min(float(response.headers["Retry-After"]), 2.0))
            return response.status
    with socket.create_connection(("127.0.0.1", port), timeout=300) as client:
        if kind == LARGE:
            client.sendall(head_of(headers, 200 * MIB))
            with contextlib.suppress(OSError):
                for _ in range(200):
                    client.sendall(bytes(MIB))
        elif kind == SLOW:
            client.sendall(head_of(headers, len(body)) + body[: len(body) // 2])
        else:
            client.sendall(head_of(headers, len(body)) + body)
            return None
        try:
            answer = client.recv(100)
        except OSError:
            return None
        return int(answer[9:12]) if answer else None


def resident(process_id):
    """MiB of memory that a process holds, and at most has held."""
    with open(f"/proc/{process_id}/status") as file:
        said = dict(line.split(":", 1) for line in file)
    return [int(said[name].split()[0]) // 1024 for name in ("VmRSS", "VmHWM")]


def health(port):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(client):
        client.request("GET", "/health")
        return json.loads(client.getresponse().read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--image_size", type=int, default=112)
    args = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="checkpoint_")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (folder, args.image_size, theirs)
    server = context.Process(target=serve, args=arguments)
    server.start()
    port = ours.recv()
    process_id = server.pid
    assert process_id is not None
    while True:
        with contextlib.suppress(OSError):
            assert health(port)["status"] == "ready"
            break
        time.sleep(0.1)
    images = dict.fromkeys(KINDS, photo(640, 480))
    images |= {NO_IMAGE: bytes(300_000), HUGE: photo(4000, 3000)}
    assert one(GOOD, port, images) == 200
    before, _ = resident(process_id)
    statuses = collections.defaultdict(collections.Counter)
    latencies, lock = [], threading.Lock()
    end = time.monotonic() + args.seconds

    def client(number):
        kind = KINDS[number % len(KINDS)]
        while time.monotonic() < end:
            began = time.monotonic()
            status = one(kind, port, images)
            if kind != GOOD:
                time.sleep(0.5)
            with lock:
                statuses[kind][status] += 1
                if kind == GOOD and status == 200:
                    latencies.append(time.monotonic() - began)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(args.clients)]
    for thread in threads:
        thread.start()
    time.sleep(args.seconds / 2)
    halfway, peak_halfway = resident(process_id)
    os.rmdir(folder)
    for thread in threads:
        thread.join()
    status = one(GOOD, port, images)
    said = health(port)
    after, peak = resident(process_id)
    server.terminate()
    server.join(60)
    for kind, found in statuses.items():
        print(f"{kind}: {dict(found)}")
    p50, p95 = np.percentile(latencies, [50, 95])
    print(f"latency of good requests: p50 {p50:.2f} s, p95 {p95:.2f} s")
    print(f"throughput: {len(latencies) / args.seconds:.1f} good requests per second")
    print(
        f"resident: {before} MiB before, {halfway} halfway, {after} after; peak "
        f"{peak_halfway} in the first half, {peak} at all"
    )
    print(f"at the end: {status}, {said['model']}, exit code {server.exitcode}")
    wrong = {k: set(v) - ALLOWED[k] for k, v in statuses.items() if set(v) - ALLOWED[k]}
    assert not wrong, wrong
    assert status == 200 and "gone" in said["model"] and server.exitcode == 0
    # Bodies of 128 MiB in two copies, 1 GiB of images that are decoded, what malloc
    # keeps; and no more the longer it lasts.
    assert peak - before < 1536, "memory is not bounded"
    assert peak < 1.15 * peak_halfway, "memory grows"


if __name__ == "__main__":
    sys.exit(main())
